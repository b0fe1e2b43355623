#!/bin/sh
# `server DIRECTORY`: Swift's account, container, object and proxy servers with the S3 API on port 9000.
# MINIO_ROOT_USER is ACCOUNT:USER, as Swift's S3 access keys are written.
set -eu
data=$2
account=${MINIO_ROOT_USER%%:*} user=${MINIO_ROOT_USER##*:}
mkdir -p /etc/swift "$data/d1" /var/cache/swift
cat >/etc/swift/swift.conf <<CONF
[swift-hash]
swift_hash_path_suffix = basalt
swift_hash_path_prefix = basalt
[storage-policy:0]
name = default
default = yes
CONF
cd /etc/swift
port=6200
for kind in object container account; do
    rm -f $kind.builder $kind.ring.gz
    swift-ring-builder $kind.builder create 4 1 1 >/dev/null
    swift-ring-builder $kind.builder add r1z1-127.0.0.1:$port/d1 1 >/dev/null
    swift-ring-builder $kind.builder rebalance >/dev/null
    cat >$kind-server.conf <<CONF
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $port
devices = $data
mount_check = false
user = root
workers = 1
[pipeline:main]
pipeline = $kind-server
[app:$kind-server]
use = egg:swift#$kind
[$kind-replicator]
[$kind-updater]
[$kind-auditor]
[container-sync]
[container-sharder]
[account-reaper]
CONF
    port=$((port + 1))
done
cat >proxy-server.conf <<CONF
[DEFAULT]
bind_ip = 0.0.0.0
bind_port = 9000
user = root
workers = 2
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth copy slo dlo versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:11211
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
dns_compliant_bucket_names = false
[filter:tempauth]
use = egg:swift#tempauth
user_${account}_${user} = $MINIO_ROOT_PASSWORD .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
CONF
memcached -u nobody -l 127.0.0.1 &
for kind in object container account proxy; do
    swift-$kind-server /etc/swift/$kind-server.conf &
done
trap 'kill 0' TERM INT
wait

#!/bin/sh
# Makes the stand-in images (see README.md) and prints the lines for .env. As root, with an engine and debootstrap.
set -eu
cd "$(dirname "$0")"
bridge=$(docker network inspect bridge -f '{{(index .IPAM.Config 0).Gateway}}')
if ! docker image inspect standin/python >/dev/null 2>&1; then
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$root" >&2
    # Containers reach package registries by the certificates this machine does.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntrusted-host = %s\n' "$bridge" >"$root/etc/pip.conf"
    rm -rf "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/var/cache/apt/archives/*.deb \
        "$root"/var/lib/apt/lists/*
    find "$root" -name __pycache__ -prune -exec rm -rf {} +
    tar -C "$root" -c . | docker import - standin/python >&2
    rm -rf "$root"
fi
for name in redis postgres minio prometheus haproxy; do
    docker build -q -t "standin/$name" "$name" >&2
done
# torch's CPU build as this machine's pip finds it, on an index that containers reach while they are built.
wheels=${TMPDIR:-/tmp}/basalt-standin-wheels
port=8899
ls "$wheels"/torch/*.whl >/dev/null 2>&1 || python3 -m pip download -q --no-deps -d "$wheels/torch" torch==2.13.0 >&2
python3 -c "import urllib.request as r; r.urlopen('http://$bridge:$port/torch/')" 2>/dev/null ||
    setsid nohup python3 -m http.server -d "$wheels" -b "$bridge" "$port" >/dev/null 2>&1 &
cat <<ENV
PYTHON_IMAGE=standin/python
REDIS_IMAGE=standin/redis
POSTGRES_IMAGE=standin/postgres
MINIO_IMAGE=standin/minio
PROMETHEUS_IMAGE=standin/prometheus
HAPROXY_IMAGE=standin/haproxy
BASALT_S3_ACCESS_KEY=basalt:basalt
TORCH_CPU_INDEX=http://$bridge:$port/
ENV

"""Random passwords in the Secret `basalt` of a Kubernetes namespace, unless it is there: `deploy/k8s/15-secrets.yaml`.

Run inside the cluster, where the pod's service account may create Secrets. Standard library only.
"""

import base64
import json
import os
import secrets
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("BASALT_SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
# The manifests refer to them.
NAMES = ("database-password", "redis-password", "s3-access-key", "s3-secret-key", "service-key")
SECONDS = 10.0


def main() -> None:
    api = os.environ.get("BASALT_CLUSTER_API", "https://kubernetes.default.svc")
    namespace = (ACCOUNT / "namespace").read_text()
    data = {name: base64.b64encode(secrets.token_hex(24).encode()).decode() for name in NAMES}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "basalt"}, "type": "Opaque", "data": data}
    request = urllib.request.Request(
        f"{api}/api/v1/namespaces/{namespace}/secrets",
        json.dumps(secret).encode(),
        {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/json"},
    )
    trusted = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if api.startswith("https") else None
    try:
        urllib.request.urlopen(request, timeout=SECONDS, context=trusted).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:
            sys.exit(f"basalt: the cluster refuses to keep the secret: {error.code} {error.read(300).decode()}")
        print("the Secret basalt is there")
    except OSError as error:
        sys.exit(f"basalt: the cluster's API cannot be reached: {error}")
    else:
        print("made the Secret basalt")


if __name__ == "__main__":
    main()

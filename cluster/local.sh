#!/usr/bin/env bash
# A Ray head with its dashboard on this machine, in the foreground until Ctrl-C.
#   cluster/local.sh [PORT [DASHBOARD_PORT [further options of ray start]]]
# Ray 2.60 turns token authentication on unless told; this head listens to whoever reaches it, so keep it private.
set -euo pipefail
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
exec ray start --head --block --disable-usage-stats --include-dashboard=true \
  --port="${1:-6379}" --dashboard-port="${2:-8265}" "${@:3}"

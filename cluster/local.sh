#!/usr/bin/env bash
# A Ray head with its dashboard on this machine, in the foreground until Ctrl-C or SIGTERM.
#   cluster/local.sh [PORT [DASHBOARD_PORT [further options of ray start for the head]]]
# NODES=2 brings up two more raylets beside it, each with NODE_OPTIONS, and ends them with it:
#   NODES=2 NODE_OPTIONS=--num-cpus=1 cluster/local.sh 6379 8265 --num-cpus=0
# Ray 2.60 turns token authentication on unless told; this head listens to whoever reaches it, so keep it private.
set -euo pipefail
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
port="${1:-6379}"
head=(ray start --head --block --disable-usage-stats --include-dashboard=true
  --port="$port" --dashboard-port="${2:-8265}" "${@:3}")
[ "${NODES:-0}" -gt 0 ] || exec "${head[@]}"

# At a SIGTERM a raylet drains first, 30 s long where work goes on; nobody wants to wait for that here.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-1}"
started=()
finish() { # `ray stop` would end every Ray of this user. The head goes last: raylets would wait for it.
  trap '' INT TERM
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do
    kill "${started[i]}" 2>/dev/null || true
    [ "$i" -gt 1 ] || wait "${started[@]:$i}" || true
  done
  rm -rf "/tmp/ray-$port-"*
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"${head[@]}" & started+=($!)
until (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  kill -0 "${started[0]}" # ends here if the head could not start
  sleep 0.5
done
for ((i = 0; i < NODES; i++)); do
  # A folder each: raylets that start together in one take the same name for their sockets.
  # shellcheck disable=SC2086 # a list of words
  ray start --address="127.0.0.1:$port" --block --disable-usage-stats --temp-dir="/tmp/ray-$port-$i" ${NODE_OPTIONS:-} &
  started+=($!)
done
wait -n # until a signal comes, or one of them ends

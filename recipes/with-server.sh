#!/usr/bin/env bash
# with-server.sh LOG PORT SERVE... -- COMMAND...: start a server on PORT, run COMMAND when it is ready, stop it.
set -euo pipefail

log=$1 port=$2
shift 2
serve=()
while [ "$1" != -- ]; do
  serve+=("$1")
  shift
done
shift

"${serve[@]}" --host 127.0.0.1 --port "$port" >"$log" 2>&1 &
server=$!
stop() {
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
}
trap stop EXIT

echo "Starting the server (log: $log); the first start converts the model ..." >&2
shown=0
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "The server ended before it was ready:" >&2
    cat "$log" >&2
    exit 1
  fi
  lines=$(wc -l <"$log")
  [ "$lines" -gt "$shown" ] && tail -n +$((shown + 1)) "$log" >&2 && shown=$lines
  sleep 0.2
done
"$@"

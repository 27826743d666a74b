#!/usr/bin/env bash
# with-server.sh LOG SERVE... -- COMMAND...: start a server on a free port, run COMMAND with its address in
# LLMTOOL_URL once it is ready, stop it. The address comes from the server itself (`serve --json`): whatever else
# listens on this machine is not mistaken for it.
set -euo pipefail

log=$1
shift
serve=()
while [ "$1" != -- ]; do
  serve+=("$1")
  shift
done
shift

document=$(mktemp)
"${serve[@]}" --host 127.0.0.1 --port 0 --json >"$document" 2>"$log" &
server=$!
stop() {
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  rm -f "$document"
}
trap stop EXIT

ready() {
  url=$(sed -n 's/.*"url": *"\([^"]*\)".*/\1/p' "$document")
  [ -n "$url" ] || return 1
  local address=${url#http://} status
  exec 3<>"/dev/tcp/${address%:*}/${address##*:}" || return 1
  printf 'GET /ready HTTP/1.0\r\n\r\n' >&3
  read -r -t 5 _ status _ <&3 || status=
  exec 3>&-
  [ "$status" = 200 ]
}

echo "Starting the server (log: $log); the first start converts the model ..." >&2
shown=0
until ready; do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "The server ended before it was ready:" >&2
    cat "$log" >&2
    exit 1
  fi
  lines=$(wc -l <"$log")
  [ "$lines" -gt "$shown" ] && tail -n +$((shown + 1)) "$log" >&2 && shown=$lines
  sleep 0.2
done
LLMTOOL_URL=$url "$@"

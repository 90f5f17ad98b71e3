#!/usr/bin/env bash
# One task: runs a command, hands signals on to it, and notes how it failed where no other task has failed before.
#
# srun's own exit status does not tell that: those of tasks which it ends itself hide that of the task which failed.
set -uo pipefail
"$@" &
child=$!
trap 'kill -USR1 "$child" 2>/dev/null' USR1
trap 'kill -TERM "$child" 2>/dev/null' TERM
while :; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break
done
if [[ ${MEGARQ_STATUS:-} ]] && ((status)); then
    (set -o noclobber && echo "$status" >"$MEGARQ_STATUS") 2>/dev/null
fi
exit "$status"

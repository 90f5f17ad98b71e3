# shellcheck shell=bash
# What the jobs share, sourced by each: the site's settings, how tasks start, and what the end of them means.
#
#     rank that ended first   0    the job is done
#                             2    a person must mend something: the job fails
#                             75   asked to stop, all saved: the job is queued again
#                             143  ended by SIGTERM, as commands are that save all the time: the same
#                             else a fault: queued again, MAX_DEATHS times at most without progress between them

cd "${MEGARQ_ROOT:-$SLURM_SUBMIT_DIR}" || exit 2
here=launchers/slurm
# shellcheck source=/dev/null
source "${MEGARQ_SITE:-$here/site.env}"
eval "${SETUP:-}"
mkdir -p "$LOGS"
notes=$LOGS/job-$SLURM_JOB_ID
# Of a job array one task, of which one has the whole array's number for its own.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-$SLURM_JOB_ID}
# Since SLURM 22.05 srun does not take it from the job by itself.
[[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

say() {
    printf '%s %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_NAME" "$*"
}

# Where ranks meet: the job's first node, at a port of its own.
meet() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

# One task for each rank of the allocation, each running this Python script; a task that fails ends the others.
ranks() {
    # shellcheck disable=SC2086 # options are words
    exec srun --kill-on-bad-exit=1 --label ${SRUN_OPTIONS:-} bash $here/task.sh ${CONTAINER:-} python -u "$@"
}

# A Python script on its own.
alone() {
    # shellcheck disable=SC2086
    exec srun --nodes=1 --ntasks=1 ${SRUN_OPTIONS:-} bash $here/task.sh ${CONTAINER:-} python -u "$@"
}

# The value of --output among arguments.
output_of() {
    while (($#)); do
        case $1 in
            --output) printf '%s\n' "$2"; return ;;
            --output=*) printf '%s\n' "${1#--output=}"; return ;;
        esac
        shift
    done
}

# How far a command has come, as a word that changes when it comes further: the newest checkpoint of a training run, or
# the number of files that are whole.
progress() {
    if [[ -e $1/checkpoints/latest ]]; then
        cat "$1/checkpoints/latest"
    elif [[ -d $1 ]]; then
        find "$1" -type f ! -name '.*' | wc -l
    else
        echo nothing
    fi
}

# Run a function of this file with its arguments, hand signals on to it, and end the job by how it ended.
supervise() {
    local output code=0 status asked=
    output=$(output_of "$@")
    export MEGARQ_STATUS=$notes.status
    rm -f "$MEGARQ_STATUS"
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
    # Before a time limit SLURM sends USR1 here, to this shell alone, and TERM when it takes the nodes away.
    trap 'asked=yes; kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
    "$@" &
    step=$!
    while :; do # a signal interrupts `wait`, and not what it waits for
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    status=$(cat "$MEGARQ_STATUS" 2>/dev/null || echo "$code")
    if ((code == 0)); then
        say "done"
        rm -f "$notes".*
        exit 0
    elif ((status == 2)); then
        say "ended with status 2: see the message above, and mend it before this is started again"
        exit 2
    elif ((status == 75 || status == 143)) || [[ $asked ]]; then
        say "stopped as asked"
    else
        count_death "$(progress "$output")" "$status"
    fi
    # A job that somebody has cancelled is told to stop as well, and must not come back.
    case $(state) in
        RUNNING) say "queued again" && scontrol requeue "$this_job" && return ;;
        '') say "SLURM does not tell the state of job $this_job: not queued again" ;;
    esac
    exit 1 # what waits for this job must not begin
}

# The job's state; empty where SLURM does not answer.
state() {
    local attempt
    for attempt in 1 2 3; do
        squeue --noheader --job="$this_job" --format=%T 2>/dev/null && return
        sleep "$attempt"
    done
}

# Take note of a fault, and end the job where there were too many without progress.
count_death() {
    local deaths=0 before=
    [[ -e $notes.deaths ]] && read -r deaths before <"$notes.deaths"
    [[ $before == "$1" ]] || deaths=0
    printf '%d %s\n' $((deaths += 1)) "$1" >"$notes.deaths"
    say "a fault (status $2), the ${deaths}. in a row at $1"
    if ((deaths >= ${MAX_DEATHS:-3})); then
        say "giving up: no progress in $deaths attempts. Look at the output above, then submit the same again."
        exit 1
    fi
}

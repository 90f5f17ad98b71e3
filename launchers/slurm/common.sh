# shellcheck shell=bash
# What the jobs share, sourced by each: the site's settings, how tasks start, and what the end of them means.
#
#     rank that ended first   0    the job is done
#                             2    a person must mend something: the job fails
#                             75   asked to stop, all saved: the job is queued again
#                             73   another job trains into the folder: a fault, whatever progress that job makes
#                             else a fault: queued again, MAX_DEATHS times at most without progress between them

cd "${MEGARQ_ROOT:-$SLURM_SUBMIT_DIR}" || exit 2
here=launchers/slurm
# shellcheck source=launchers/slurm/read_site.sh
source $here/read_site.sh
export SLURM_EXPORT_ENV=ALL # where sbatch was told to export nothing, srun would hand tasks no environment either
mkdir -p "$LOGS"
notes=$LOGS/job-$SLURM_JOB_ID
# Of a job array one task, of which one has the whole array's number for its own.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-$SLURM_JOB_ID}
# Since SLURM 22.05 srun does not take it from the job by itself.
[[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

say() {
    printf '%s %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_NAME" "$*" 2>/dev/null || true # the disk may be full
}

# Where ranks meet: the job's first node, at a port of its own, and another one after a restart.
meet() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
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
    elif [[ -e $1/events.jsonl || -e $1/config.resolved.yaml ]]; then
        echo "no checkpoint"
    elif [[ -d $1 ]]; then
        find "$1" -type f ! -name '.*' | wc -l
    else
        echo nothing
    fi
}

# Run a function of this file with its arguments, hand signals on to it, and end the job by how it ended.
supervise() {
    local output code=0 status asked='' watcher
    set +e # whatever fails here, how the job ended is still judged
    output=$(output_of "$@")
    export MEGARQ_STATUS=$notes.status
    rm -f "$MEGARQ_STATUS"
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
    # Before a time limit SLURM sends USR1 here, to this shell alone, and TERM when it takes the nodes away.
    step=
    trap 'asked=yes; [[ $step ]] && kill -USR1 "$step" 2>/dev/null' USR1 TERM
    (set -e && "$@") &
    step=$!
    [[ $asked ]] && kill -USR1 "$step"
    bound "$step" &
    watcher=$!
    disown "$watcher" # its end is not news
    while :; do # a signal interrupts `wait`, and not what it waits for
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    kill -KILL "$watcher" 2>/dev/null
    status=$(cat "$MEGARQ_STATUS" 2>/dev/null)
    status=${status:-$code}
    if ((code == 0)); then
        say "done"
        rm -f "$notes".*
        exit 0
    elif ((status == 2)); then
        say "ended with status 2: see the message above, and mend it before this is started again"
        exit 2
    elif ((status == 75)) || [[ $asked ]]; then
        say "stopped as asked"
    elif ((status == 73)); then
        count_death "another job's folder" "$status"
    else
        count_death "$(progress "$output")" "$status"
    fi
    queue_again
}

# End what starts the tasks where it does not return END_SECONDS after one of them has failed: srun waits without end
# for a node whose daemon has died.
bound() {
    local seconds=0
    trap '' USR1 TERM
    while ((seconds < ${END_SECONDS:-120})); do
        sleep 1
        [[ -e $MEGARQ_STATUS ]] && ((seconds += 1))
    done
    say "not returned for $seconds s after a rank ended with status $(cat "$MEGARQ_STATUS"): given up"
    kill -KILL "$1"
}

# Ask SLURM to queue the job again, as often as it takes while the controller is away. A job that somebody has cancelled
# is told to stop as well, and must not come back.
queue_again() {
    local pause=1 refused=0 deadline=$((SECONDS + 3600))
    while ((SECONDS < deadline && refused < 5)); do
        case $(squeue --noheader --job="$this_job" --format=%T 2>/dev/null) in
            RUNNING)
                say "asks to be queued again"
                scontrol requeue "$this_job" && return
                ((refused += 1))
                ;;
            '') say "SLURM does not tell the state of job $this_job: asked again in $pause s" ;;
            *) break ;;
        esac
        sleep $pause
        ((pause = pause < 60 ? 2 * pause : 60))
    done
    exit 1 # what waits for this job must not begin
}

# Take note of a fault, and end the job where there were too many without progress.
count_death() {
    local deaths=0 before=
    [[ -s $notes.deaths ]] && read -r deaths before <"$notes.deaths"
    [[ $before == "$1" ]] || deaths=0
    ((deaths += 1))
    if ! printf '%d %s\n' "$deaths" "$1" >"$notes.deaths" 2>/dev/null; then # a full disk: all of them, then
        deaths=$((${SLURM_RESTART_COUNT:-0} + 1))
    fi
    say "a fault (status $2), the ${deaths}. in a row at $1"
    if ((deaths >= ${MAX_DEATHS:-3})); then
        say "giving up: no progress in $deaths attempts. Look at the output above, then submit the same again."
        exit 1
    fi
}

# What the site has done before everything else. Where that fails, it may be by this node, and a job that is run once is
# not queued again.
setup_failed() {
    trap - EXIT
    [[ ${ONCE:-} ]] && exit "$1"
    set +eu
    say "SETUP ended with status $1 on ${SLURMD_NODENAME:-this node}"
    count_death SETUP "$1"
    queue_again
    exit 0
}
trap 'setup_failed $?' EXIT
trap 'trap - EXIT; say "stopped as asked"; queue_again; exit 0' USR1 TERM
set +u
eval "${SETUP:-}"
set -u
trap - EXIT USR1 TERM

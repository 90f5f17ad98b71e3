#!/usr/bin/env bash
# Submit the whole walk, each job behind those whose files it reads: pipeline.sh WALK.env
#
# WALK.env holds the arguments of each command, as walk.env.example does; a step that it does not set is left out. Prints
# a line a job: its name and number. A job that fails takes those behind it out of the queue.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

[[ -e ${1:-} ]] || fail "${1:-no file of arguments}: give a file such as $here/walk.env.example"
walk=$(realpath "$1")
MEGARQ_SITE=$(realpath -m "${MEGARQ_SITE:-$here/site.env}")
export MEGARQ_SITE
cd "$here/../.."
# shellcheck source=launchers/slurm/read_site.sh
source "$here/read_site.sh"
# shellcheck source=/dev/null
source "$walk"

declare -A numbers=()

# Half a walk would be submitted a second time with the other half.
take_back() {
    ((${#numbers[@]})) || return 0
    scancel "${numbers[@]}"
    printf 'cancelled what was submitted before: %s\n' "${numbers[*]}" >&2
}
trap take_back EXIT

# step NAME JOB BEHIND...: submit a job with the arguments of NAME, behind these steps, as far as they are part of the walk.
step() {
    local name=$1 job=$2 behind='' before number
    local -n arguments=$name options=${name}_SBATCH
    shift 2
    [[ -v arguments ]] || return 0
    for before; do
        [[ ${numbers[$before]:-} ]] && behind+=:${numbers[$before]}
    done
    [[ $behind ]] && behind="--dependency=afterok$behind"
    number=$("$here/submit.sh" "$job" --kill-on-invalid-dep=yes ${behind:+"$behind"} "${options[@]}" -- "${arguments[@]}")
    numbers[$name]=$number
    printf '%-16s %s\n' "${name,,}" "$number"
}

step MAKE_SHARDS make_shards
step TRAIN_TOKENIZER train_tokenizer MAKE_SHARDS
step TRAIN_RQVAE train_rqvae MAKE_SHARDS
step PRETOKENIZE pretokenize MAKE_SHARDS TRAIN_RQVAE
step VERIFY_CODES verify_codes PRETOKENIZE
step TRAIN train TRAIN_TOKENIZER PRETOKENIZE VERIFY_CODES
step EXPORT export TRAIN
step DRAW evaluate EXPORT
step SCORE evaluate DRAW
trap - EXIT

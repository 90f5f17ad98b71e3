#!/usr/bin/env bash
# Submit a job with the site's settings: submit.sh JOB [sbatch options] -- [arguments of its command]
#
#     launchers/slurm/submit.sh train --nodes=8 -- --ds_config zero3.json --model t2i-3.9b --data CODES \
#         --tokenizer tokenizer.json --output runs/t2i
#
# Prints the number of the job.
set -euo pipefail
MEGARQ_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$MEGARQ_ROOT/launchers/slurm
MEGARQ_SITE=$(realpath -m "${MEGARQ_SITE:-$here/site.env}")
export MEGARQ_ROOT MEGARQ_SITE

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

[[ $# -ge 1 && -e $here/$1.sbatch ]] || fail "${1:-no job}: use one of $(cd "$here" && printf '%s ' *.sbatch | sed 's/\.sbatch//g')"
[[ -e $MEGARQ_SITE ]] || fail "$MEGARQ_SITE does not exist: copy $here/site.env.example to it and fill it in"
job=$1
shift
options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
[[ ${1:-} == -- ]] || fail "$job: put -- between sbatch's options and the arguments of the command"
shift

cd "$MEGARQ_ROOT" # relative paths are the job's, which runs here
# shellcheck source=launchers/slurm/read_site.sh
source "$here/read_site.sh"
: "${LOGS:?$MEGARQ_SITE sets no LOGS: a folder that all nodes share}"
: "${RANKS_PER_NODE:?$MEGARQ_SITE sets no RANKS_PER_NODE: the GPUs of a node}"
mkdir -p "$LOGS"
site=(--chdir="$MEGARQ_ROOT" --export=ALL --signal="B:USR1@${STOP_SECONDS:-120}")
for setting in partition account qos time; do
    name=${setting^^}
    [[ ${!name:-} ]] && site+=("--$setting=${!name}")
done
cpus=${CPUS_PER_RANK:-8}
case $job in
    make_shards | train_tokenizer | verify_codes | export)
        site+=(--nodes=1 --ntasks=1 --cpus-per-task="${CPUS_WITHOUT_GPU:-4}")
        ;;
    train_torchrun)
        site+=(--ntasks-per-node=1 --cpus-per-task=$((RANKS_PER_NODE * cpus)) "${GPU_OPTIONS[@]}")
        ;;
    *)
        site+=(--ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$cpus" "${GPU_OPTIONS[@]}")
        ;;
esac
output=$LOGS/%x-%j.out
[[ " ${options[*]}" == *" --array"* || " ${options[*]}" == *" -a"* ]] && output=$LOGS/%x-%A_%a.out
exec sbatch --parsable --output="$output" "${site[@]}" "${SBATCH_OPTIONS[@]}" "${options[@]}" "$here/$job.sbatch" "$@"

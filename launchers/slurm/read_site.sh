# shellcheck shell=bash
# The site's settings, for scripts that have gone to the repository's root.
set +u # sites write what this does not let pass, such as $LD_LIBRARY_PATH
# shellcheck source=/dev/null
source "${MEGARQ_SITE:-launchers/slurm/site.env}"
set -u

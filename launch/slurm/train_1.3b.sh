#!/bin/bash -l
# 1.3B parameters on 80 nodes of LUMI-G or a machine like it, 640 ranks: 4 x 4 ranks for windows x 10 stages x
# 4 ranks for the tokens of a window (12 heads, so not 8). The published layout with 4 instead of 12 ranks a
# window; not run there.
#
# The job asks for 1 % more nodes: those that fail the preflight, or later, are replaced by them.
# 15 minutes before the end Slurm sends USR1: the run saves, and the job submits the next one.
#
#   sbatch --account=PROJECT launch/slurm/train_1.3b.sh      from the top directory of the project
#   python -m launch submit 1.3b-24h --machine lumi --nodes 80 --account PROJECT --dry-run
#
# The second checks everything first and prints both command lines; without --dry-run it submits.
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): NODES and DP together, RUN_DIR, DATA (a store of
# aeris.data.convert), VENV, ARCHIVE (an environment of `launch pack`, put on every node), FLAGS (more flags of
# aeris.train, by blanks), CHAIN (the script of the next job; empty: none).
# Also PRESET: 1.3b-24h or 1.3b-6h. A replica needs 80 nodes, and DP divides the batch of 20.
#SBATCH --job-name=train_1.3b
#SBATCH --partition=standard-g
#SBATCH --nodes=81
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --no-kill
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@900
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export NODES="${NODES:-80}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine lumi --nodes "$NODES" \
    --resubmit "${CHAIN-launch/slurm/train_1.3b.sh}" --stage "${ARCHIVE:-}" -- \
    aeris.train "${PRESET:-1.3b-24h}" --run-dir "${RUN_DIR:-runs/${PRESET:-1.3b-24h}}" \
    --data.store "${DATA:-era5}" --checkpoint.every-minutes 15 \
    --parallel.dp "${DP:-1}" --parallel.wp-y 4 --parallel.wp-x 4 --parallel.pp 10 --parallel.sp 4 "${flags[@]}"

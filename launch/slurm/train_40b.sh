#!/bin/bash -l
# 40B parameters on 720 nodes of LUMI-G or a machine like it, 5,760 ranks: 12 x 12 ranks for windows x 10 stages
# x 4 ranks for the tokens of a window (8 would need quadrants that halve; 15 x 15 do not). Chosen by aeris.plan:
# 52 of 64 GB a device, where the published 6 x 6 x 20 with 4 instead of 12 ranks a window needs 106; not run.
#
# The job asks for 1 % more nodes: those that fail the preflight, or later, are replaced by them.
# 15 minutes before the end Slurm sends USR1: the run saves, and the job submits the next one.
#
#   sbatch --account=PROJECT launch/slurm/train_40b.sh      from the top directory of the project
#   python -m launch submit 40b --machine lumi --nodes 720 --account PROJECT --dry-run
#
# The second checks everything first and prints both command lines; without --dry-run it submits.
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): NODES and DP together, RUN_DIR, DATA (a store of
# aeris.data.convert), VENV, ARCHIVE (an environment of `launch pack`, put on every node), FLAGS (more flags of
# aeris.train, by blanks), CHAIN (the script of the next job; empty: none).
# A replica needs 720 nodes, and DP divides the batch of 1400.
#SBATCH --job-name=train_40b
#SBATCH --partition=standard-g
#SBATCH --nodes=728
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --no-kill
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@900
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export NODES="${NODES:-720}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine lumi --nodes "$NODES" \
    --resubmit "${CHAIN-launch/slurm/train_40b.sh}" --stage "${ARCHIVE:-}" -- \
    aeris.train 40b --run-dir "${RUN_DIR:-runs/40b}" --data.store "${DATA:-era5}" \
    --checkpoint.every-minutes 15 --parallel.dp "${DP:-1}" --parallel.wp-y 12 --parallel.wp-x 12 \
    --parallel.pp 10 --parallel.sp 4 "${flags[@]}"

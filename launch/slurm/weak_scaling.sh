#!/bin/bash -l
# Weak scaling of the 1.3B model on LUMI-G or a machine like it: the batch grows with the replicas, 80 nodes and
# 20 images a replica, ten steps each, one after the other on the same nodes; then the table of those that were
# finished.
#
#   sbatch --account=PROJECT launch/slurm/weak_scaling.sh      from the top directory of the project
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): REPLICAS (numbers of replicas, by blanks), RUN_DIR, DATA (a store
# of aeris.data.convert), VENV, ARCHIVE, FLAGS (more flags of aeris.train).
#SBATCH --job-name=weak_scaling
#SBATCH --partition=standard-g
#SBATCH --nodes=647
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:-}"
read -r -a replicas <<<"${REPLICAS:-1 2 4 8}"
RUN_DIR="${RUN_DIR:-runs/weak_scaling}"
finished=() preflight=()
for dp in "${replicas[@]}"; do
    python -m launch job --machine lumi --nodes "$((80 * dp))" --stage "${ARCHIVE:-}" \
        "${preflight[@]}" -- aeris.train 1.3b-6h --run-dir "$RUN_DIR/dp_$dp" --data.store "${DATA:-era5}" \
        --train.batch "$((20 * dp))" --train.images "$((200 * dp))" --checkpoint.every-images 1000000 \
        --parallel.dp "$dp" --parallel.wp-y 4 --parallel.wp-x 4 --parallel.pp 10 --parallel.sp 4 \
        "${flags[@]}" || break
    finished+=("$RUN_DIR/dp_$dp")
    preflight=(--no-preflight)
done
: "${finished[0]:?no size was finished}"
exec python -m benchmarks.weak_scaling --collect "${finished[@]}" --csv "$RUN_DIR/weak_scaling.csv"

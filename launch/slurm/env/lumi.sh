# shellcheck shell=bash
# Environment of programs on LUMI-G and machines like it: Slurm, 8 devices a node (AMD, RCCL), Slingshot.
# Sourced by the job scripts. Python comes from VENV, an environment with PyTorch for ROCm, whose RCCL needs
# the plug-in aws-ofi-rccl to use this network directly; `python -m launch preflight` shows the rates with it.
#
# Sources: [site] docs.lumi-supercomputer.eu and the site's PyTorch course; [ours].
# launch/machines.py has the core masks and the srun line.

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "error: this is for a job on LUMI-G, and SLURM_JOB_ID is not set: sbatch SCRIPT, or salloc; elsewhere" \
        "python -m launch job --machine local -- aeris.train ..." >&2
    return 2
fi

# The site's functions use unset variables.
set +u
# [site] The software of the GPU nodes; the version is the newest supported one unless LUMI_STACK says another.
module load "LUMI${LUMI_STACK:+/$LUMI_STACK}" partition/G
if [[ -n "${VENV:-}" ]]; then
    # shellcheck source=/dev/null
    source "$VENV/bin/activate"
fi
set -u

# [ours] A rank has sockets and memory handles to many others; the default of 1024 files is not enough.
ulimit -n "$(ulimit -Hn)"

# --- this project ------------------------------------------------------------------------------------------
# [ours] Packages in a home directory would be searched first, by every rank, on a small file system.
export PYTHONNOUSERSITE=1
# [site] The cores a rank is bound to: 6 of the 8 next to its device.
export OMP_NUM_THREADS=6
# [ours] Lustre has no lock for every reader of a file, and nobody writes a store that is read.
export HDF5_USE_FILE_LOCKING=FALSE

# --- RCCL and libfabric ------------------------------------------------------------------------------------
# [site] The four fast interfaces; RCCL would take the first one it finds, which can be the slow one.
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
# [site] Send from device memory when device and network card are on one host bridge ("3" in older RCCL).
export NCCL_NET_GDR_LEVEL=PHB
# [site] Data workers are forked: without these, registered memory is not safe in them.
export CXI_FORK_SAFE=1
export CXI_FORK_SAFE_HP=1

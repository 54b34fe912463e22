# shellcheck shell=bash
# Environment of programs on ALCF Aurora, sourced by the job scripts, which set NODES.
#
# Sources: [site] docs.alcf.anl.gov/aurora, pages PyTorch, oneCCL and known issues, August 2026; [run] the job
# settings of the published AERIS runs; [ours]. launch/machines.py has the core lists and the mpiexec line.

if [[ -z "${PBS_NODEFILE:-}" ]]; then
    echo "error: this is for a job on ALCF Aurora, and PBS_NODEFILE is not set: qsub SCRIPT, or qsub -I; elsewhere" \
        "python -m launch job --machine local -- aeris.train ..." >&2
    return 2
fi

# Python, PyTorch with XCCL, oneCCL and MPI of the site. Its functions use unset variables.
set +u
module load frameworks
# A virtual environment over the module's, with what the module lacks: python -m venv --system-site-packages.
if [[ -n "${VENV:-}" ]]; then
    # shellcheck source=/dev/null
    source "$VENV/bin/activate"
fi
set -u

# [site] A rank has sockets and memory handles to many others; the default of 1024 files is not enough.
ulimit -n "$(ulimit -Hn)"

# --- this project ------------------------------------------------------------------------------------------
# [ours] Packages in a home directory would be searched first, by every rank, on a small file system.
export PYTHONNOUSERSITE=1
# [run] The cores a rank is bound to (7 of them); data workers and CPU work inherit it.
export OMP_NUM_THREADS=7
# [site] Lustre has no lock for every reader of a file, and nobody writes a store that is read.
export HDF5_USE_FILE_LOCKING=FALSE

# --- devices -----------------------------------------------------------------------------------------------
# [site] 12 devices a node, one per tile, as the layouts count them. The module sets it too.
export ZE_FLAT_DEVICE_HIERARCHY=FLAT

# --- oneCCL ------------------------------------------------------------------------------------------------
# [site] Who started the ranks: PALS, which speaks PMIx; oneCCL would look for Hydra.
export CCL_PROCESS_LAUNCHER=pmix
# [site] Between nodes oneCCL sends through MPI, which knows this network.
export CCL_ATL_TRANSPORT=mpi
# [site] Addresses are exchanged through MPI at start, not through sockets to one node.
export CCL_KVS_MODE=mpi
# [run] oneCCL's thread of each rank has the core before the rank's own, so neither waits for the other.
export CCL_WORKER_AFFINITY=1,9,17,25,33,41,53,61,69,77,85,93
# With torch 2.8 only, sends and receives got stuck (pytorch issue 156782); these two helped there:
#   export CCL_SEND=direct CCL_RECV=direct

# If a start fails with "No VNIs available": starter=("mpiexec", "--pmi=pmix", "--no-vni") in launch/machines.py

# --- libfabric ---------------------------------------------------------------------------------------------
# [site] How the cache of registered memory learns that memory was freed: from the kernel. Where that gives
# errors, the site's other choice is "disabled": then everything is registered anew.
export FI_MR_CACHE_MONITOR=userfaultfd

# --- more than 1,024 nodes: what the above was tested to ---------------------------------------------------
if ((${NODES:?} > 1024)); then
    # [site] All-reduce between nodes: direct for messages to 1 MiB, by Rabenseifner's algorithm above.
    export CCL_ALLREDUCE_SCALEOUT="direct:0-1048576;rabenseifner:1048577-max"
    # [site] Broadcast down two trees at once: the best algorithm at this scale.
    export CCL_BCAST=double_tree
    # [site] Ranks are those of MPI, not agreed on anew.
    export CCL_KVS_USE_MPI_RANKS=1
    # [site] Seconds until the last rank must have come: so many take longer than the default allows.
    export CCL_KVS_CONNECTION_TIMEOUT=600
    # [site] How many handles to memory of other tiles stay open, so that they are not opened again and again.
    export CCL_ZE_CACHE_OPEN_IPC_HANDLES_THRESHOLD=1024
    # [site] Against hangs: collectives in MPI and in oneCCL each end before the next one begins.
    export CCL_ATL_SYNC_COLL=1
    export CCL_OP_SYNC=1
    # [site] Seconds PALS gives its nodes to answer: with so many, a sound job would end with "ping failed on"
    # or "RPC timeout".
    export PALS_PING_PERIOD=240
    export PALS_RPC_TIMEOUT=240
    # [site] Room for events and for messages that arrive before their receive is posted, else "Event Queue
    # overflow"; matched in software when the network card's list is full.
    export FI_CXI_DEFAULT_CQ_SIZE=1048576
    export FI_CXI_CQ_FILL_PERCENT=30
    export FI_CXI_OFLOW_BUF_SIZE=8388608
    export FI_CXI_RX_MATCH_MODE=hybrid
fi

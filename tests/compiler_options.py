"""Options of XLA's compiler for the tests. Compiling takes most of the suite's time.

``COMPILED`` leaves out some of LLVM's optimisations. ``QUICK`` leaves out all of them and has the fusions translated by
the older of XLA's two translators, which takes a third of the time. With both, all of XLA's passes stay enabled.
"""

from importlib.metadata import version

COMPILED = "--xla_backend_optimization_level=1"
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def of_tests(kind: str) -> str:
    """The options of ``quick``, ``compiled`` or ``slow`` tests (these: none, as for users)."""
    # XLA ends the process at an option that it does not know, and these are known to exist in some versions only.
    known = version("jaxlib").startswith(("0.10.",))
    return {"quick": QUICK if known else COMPILED, "compiled": COMPILED, "slow": ""}[kind]

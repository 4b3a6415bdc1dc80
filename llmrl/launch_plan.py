"""What `llmrl launch` is asked for, checked and completed: everything that can be refused is refused here, before anything starts.

A node's GPUs go to the trainer's processes first, one each, then to the vLLM servers. Every node is alike: it runs the same number of
processes and of servers, and every process asks the servers of all nodes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrl.records import InputError

if TYPE_CHECKING:
    from llmrl.config import LoadedRecipe

Purpose = Literal["run", "show", "cluster"]
"""run: on this machine, now, so its GPUs, ports and vLLM count. show: a dry run. cluster: text for other machines."""
_PROBE = (
    "import importlib.metadata as m, importlib.util as u, json; "
    "print(json.dumps([u.find_spec('vllm') is not None, any(e.name == 'llmrl' for e in m.entry_points(group='vllm.general_plugins'))]))"
)


@dataclass(frozen=True)
class Asked:
    """The options of `llmrl launch`, as they were given."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    gpus: int | None = None
    procs: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    master: str | None = None
    hosts: tuple[str, ...] = ()
    run_id: str | None = None
    vllm: int = 0
    vllm_gpus: int = 1
    vllm_python: str | None = None
    vllm_args: str = ""
    vllm_port: int = 8000
    vllm_wait: float = 600.0
    resume: bool = False
    overwrite: bool = False
    json: bool = False

    def arguments(self) -> list[str]:
        """The command line that says the same, but for what differs from node to node."""
        given = [str(self.recipe), *self.overrides]
        for name in ("gpus", "procs", "nodes", "vllm", "vllm_gpus", "vllm_python", "vllm_args", "vllm_port", "vllm_wait"):
            value = getattr(self, name)
            if value != getattr(Asked, name) and not (name.startswith("vllm_") and not self.vllm):
                given += [f"--{name.replace('_', '-')}", str(value)]
        return given + (["--resume"] if self.resume else []) + (["--overwrite"] if self.overwrite else [])


@dataclass(frozen=True)
class Plan:
    """`Asked`, checked and completed for one node."""

    asked: Asked
    loaded: LoadedRecipe
    """With the servers that we start in its [engine]."""
    overrides: tuple[str, ...]
    """The user's, and those that name the servers."""
    procs: int
    """Trainer processes a node."""
    devices: tuple[str, ...]
    """GPUs of a node by their numbers, the trainer's first; empty = CPU."""
    run_id: str
    """The same on all nodes: torchrun meets by it, and it names logs and weights."""
    mark: str
    """This launch's alone: its processes carry it."""
    hosts: tuple[str, ...]
    """Addresses of the nodes; empty when there is no need to know them."""
    model: str
    """What the servers load; empty without servers."""
    weights: Path | None
    """Where the trainer hands weights over to the servers."""

    @property
    def run_dir(self) -> Path:
        return Path(self.loaded.recipe.run.dir)

    @property
    def logs(self) -> Path:
        """Beside the run directory, not in it: the trainer takes a directory that holds something for another run."""
        return self.run_dir.with_name(f"{self.run_dir.name}.logs")

    @property
    def node_name(self) -> str:
        return socket.gethostname() if self.asked.node_rank is None else f"node-{self.asked.node_rank}"


def make_plan(asked: Asked, purpose: Purpose) -> Plan:
    """Raises InputError for whatever the user must mend."""
    from llmrl.config import check_plugins, load_recipe

    here = purpose == "run"
    _check_nodes(asked, purpose)
    if asked.gpus is None and purpose == "cluster":
        raise InputError("say how many GPUs a node has: --gpus N (0 = train on CPU)")
    gpus = _gpus_here() if asked.gpus is None else asked.gpus
    devices = _devices(gpus, here)
    procs = _procs(asked, gpus)
    ours, loaded, weights = [], load_recipe(asked.recipe, asked.overrides), None
    if asked.vllm:
        hosts = _server_hosts(asked, purpose)
        urls = [f"http://{host}:{asked.vllm_port + k}" for host in hosts for k in range(asked.vllm)]
        ours = ["engine.use=vllm", f"engine.servers={json.dumps(urls)}"]
        loaded = load_recipe(asked.recipe, [*asked.overrides, *ours])
        weights = _weights_folder(asked, loaded)
        if asked.nodes > 1 and "folder" not in loaded.recipe.engine.kwargs:
            ours.append(f"engine.folder={json.dumps(str(weights))}")
            loaded = load_recipe(asked.recipe, [*asked.overrides, *ours])
    check_plugins(loaded)
    _check_shares(loaded, procs, asked.nodes)
    model = served_model(loaded, convert=here) if asked.vllm else ""
    own = uuid.uuid4().hex[:12]
    met = re.sub(r"\W+", "-", asked.master or "")
    run_id = asked.run_id or (met if asked.nodes > 1 else own)
    hosts = _server_hosts(asked, purpose) if asked.vllm else ()
    plan = Plan(asked, loaded, (*asked.overrides, *ours), procs, devices, run_id, f"{run_id}.{own}", hosts, model, weights)
    if here:
        _check_here(plan)
    return plan


def _check_shares(loaded: LoadedRecipe, procs: int, nodes: int) -> None:
    prompts, world = loaded.recipe.rollout.prompts, procs * nodes
    if prompts % world:
        near = sorted({prompts // world * world or world, (prompts // world + 1) * world})
        fewer = next((p for p in range(procs, 0, -1) if prompts % (p * nodes) == 0), None)
        raise InputError(
            f"{loaded.where('rollout.prompts')}: {prompts} prompts a step cannot be shared evenly by {world} trainer processes; "
            f"rollout.prompts={' or '.join(map(str, near))} can" + (f", or take --procs {fewer}" if fewer else "")
        )


def _check_nodes(asked: Asked, purpose: Purpose) -> None:
    if asked.node_rank is not None and not 0 <= asked.node_rank < asked.nodes:
        raise InputError(f"--node-rank {asked.node_rank}: with --nodes {asked.nodes} it is 0 to {asked.nodes - 1}")
    if asked.nodes > 1 and purpose != "cluster":
        if asked.master is None:
            raise InputError(f"--nodes {asked.nodes} needs --master HOST:PORT, an address of node 0 that the other nodes reach; or --slurm, or --k8s")
        if asked.node_rank is None and asked.run_id is None:
            raise InputError("--nodes needs --node-rank R, this node's number; or --run-id ID, the same on all nodes, to have them numbered as they meet")
    host, _, port = (asked.master or "").rpartition(":")
    if asked.master is not None and not (host and port.isdigit()):
        raise InputError(f"--master {asked.master}: expected HOST:PORT, e.g. node0:29500")
    if asked.run_id is not None and not asked.run_id.replace("-", "").isalnum():
        raise InputError(f"--run-id {asked.run_id!r}: letters, digits and dashes only")


def _server_hosts(asked: Asked, purpose: Purpose) -> tuple[str, ...]:
    if asked.nodes == 1:
        return ("127.0.0.1",)
    hosts = asked.hosts or (tuple(f"node{k}" for k in range(asked.nodes)) if purpose == "cluster" else ())
    if len(hosts) != asked.nodes:
        raise InputError(f"--vllm with --nodes {asked.nodes} needs --hosts A,B,...: the addresses of all {asked.nodes} nodes; got {len(hosts)}")
    return hosts


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _devices(gpus: int, here: bool) -> tuple[str, ...]:
    """The first `gpus` GPUs that this process may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in allowed.split(",") if name] if here else []
    if here and gpus:
        there = _gpus_here()
        if gpus > there:
            raise InputError(f"--gpus {gpus}: this machine has {there}" + (f" (CUDA_VISIBLE_DEVICES={allowed})" if names else "") + "; --gpus 0 trains on CPU")
    return tuple(names[:gpus]) if len(names) >= gpus else tuple(str(k) for k in range(gpus))


def _procs(asked: Asked, gpus: int) -> int:
    """Trainer processes a node."""
    left = gpus - asked.vllm * asked.vllm_gpus
    if not gpus:
        return asked.procs or 1
    taken = f"{asked.vllm} vLLM server{'s' if asked.vllm > 1 else ''} of {asked.vllm_gpus} take {gpus - left} of --gpus {gpus}"
    if left < 1:
        raise InputError(f"{taken}, and the trainer needs one at least")
    if asked.procs is not None and asked.procs > left:
        raise InputError(f"--procs {asked.procs}: one process a GPU, and " + (f"{taken}: {left} are left" if asked.vllm else f"there are {gpus}"))
    return asked.procs or left


def _weights_folder(asked: Asked, loaded: LoadedRecipe) -> Path:
    """The engine's own choice on one node, memory mostly; on several beside the run directory, which all of them see anyway."""
    from llmrl.weights import default_folder

    told = loaded.recipe.engine.kwargs.get("folder")
    if told is not None:
        return Path(told)
    return Path(f"{Path(loaded.recipe.run.dir).absolute()}.weights") if asked.nodes > 1 else default_folder()


def served_model(loaded: LoadedRecipe, *, convert: bool) -> str:
    """The folder or Hub id that a server loads for [model]. A GGUF file is converted to a folder first, unless `convert` is False."""
    from llmrl.models import _converted, _locate

    path = loaded.recipe.model.path
    if path == "tiny":
        drop = " ".join(f"{key}=" for key in ("model.tiny", "warm_start") if any(k.startswith(f"{key}.") and o == "file" for k, o in loaded.origins.items()))
        raise InputError(
            f'{loaded.where("model.path")}: "tiny" is made in the trainer\'s memory, and a vLLM server loads a folder: write one with '
            f"`llmrl sft {loaded.path} run.dir=runs/warm`, then give model.path=runs/warm/model {drop}".rstrip()
        )
    found = _locate(path, loaded.base)
    if not found.endswith(".gguf"):
        return found
    return str(_converted(Path(found))) if convert else f"<folder made from {Path(found).name}>"


def _check_here(plan: Plan) -> None:
    """This machine's side: ports, vLLM's interpreter, the run directory."""
    asked = plan.asked
    ports = {f"--vllm-port {asked.vllm_port}": [asked.vllm_port + k for k in range(asked.vllm)]}
    if asked.nodes > 1 and asked.node_rank == 0 and asked.master is not None:
        ports[f"--master {asked.master}"] = [int(asked.master.rpartition(":")[2])]
    for option, numbers in ports.items():
        for port in numbers:
            if not 0 < port < 65536 or _in_use(port):
                raise InputError(f"{option}: port {port} is in use on this machine, or none; choose another")
    if asked.vllm:
        _check_interpreter(asked.vllm_python or sys.executable)
        from llmrl.session import check_run_folder

        check_run_folder(plan.loaded, resume=asked.resume, overwrite=asked.overwrite)  # before a server takes minutes to start


def _in_use(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a connection that lingers from the last run is no reason
        try:
            s.bind(("", port))
        except OSError:
            return True
    return False


def _check_interpreter(python: str) -> None:
    """vLLM is not imported for this: that takes ten seconds."""
    mend = "name the interpreter of vLLM's environment: --vllm-python /path/to/python"
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--vllm-python {python}: it does not run: {error}") from error
    try:
        vllm, plugin = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(f"--vllm-python {python}: it is no Python: {(done.stderr or done.stdout).strip()[-300:]}") from error
    if not vllm:
        raise InputError(f"--vllm-python {python}: vllm is not installed there; {mend}")
    if not plugin:
        raise InputError(f"--vllm-python {python}: llmrl is not installed beside vllm, so it cannot take our weights; {python} -m pip install --no-deps llmrl")

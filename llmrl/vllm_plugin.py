"""What runs inside vLLM: the weight-transfer backends `llmrl_file` and `llmrl_broadcast`.

`llmrl_file` reads safetensors files from a path that trainer and server share: on CPU, over a shared disk, where NCCL does not reach.
`llmrl_broadcast` can do that too, and also takes tensors from a group of processes in which the trainer sends and every worker of every
server receives (llmrl/vllm_broadcast.py: NCCL between GPUs, gloo between CPUs). vLLM's stock `nccl` and `ipc` are not used: their other half
would need vLLM in the trainer's environment.

vLLM loads both through the entry point `vllm.general_plugins` of this distribution (`pip install --no-deps llmrl` in vLLM's environment) and
the option `--weight-transfer-config '{"backend": "llmrl_broadcast"}'`. Written for vLLM 0.32; llmrl/vllm_routes.py is the other side.
"""

from __future__ import annotations

from typing import Any

FILE, BROADCAST = "llmrl_file", "llmrl_broadcast"


def register() -> None:
    """The entry point."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # type: ignore[import-not-found]

    if FILE not in WeightTransferEngineFactory._registry:  # every process of a server calls this, some twice
        files = _file_engine()
        WeightTransferEngineFactory.register_engine(FILE, files)
        WeightTransferEngineFactory.register_engine(BROADCAST, _broadcast_engine(files))


def _file_engine() -> Any:
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer.base import (  # type: ignore[import-not-found]
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class Init(WeightTransferInitInfo):
        repair: bool = True
        """Rebuild the packed head of a model with tied embeddings after an update; False only to show what happens without it."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        path: str
        """A safetensors file with whole tensors by their checkpoint names."""

    class FileEngine(WeightTransferEngine):
        init_info_cls: Any = Init
        update_info_cls: Any = Update
        repair = True
        begun = False
        """An update was begun and not finished."""

        def init_transfer_engine(self, init_info: Any) -> None:
            self.repair = init_info.repair

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import (  # type: ignore[import-not-found]
                finalize_layerwise_reload,
                initialize_layerwise_reload,
            )

            if self.begun:  # it broke off: what was loaded of it would count towards this one, and layers be taken for whole that are not
                finalize_layerwise_reload(self.model, self.model_config)
            self.begun = True
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            import torch

            self.receive_weights(self.parse_update_info(update_info))  # the base class then asks for an accelerator; a CPU has none
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Any) -> None:
            from safetensors import safe_open

            with safe_open(update_info.path, framework="pt", device=str(self.device)) as file:
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - it is no dict

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload  # type: ignore[import-not-found]

            finalize_layerwise_reload(self.model, self.model_config)
            self.begun = False
            head: Any = getattr(self.model, "lm_head", None)
            tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
            if self.repair and tied and self.device.type == "cpu" and hasattr(head, "quant_method"):
                # on CPU the head keeps a packed copy of the embedding, which a reload does not refresh
                head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None:
            pass

    return FileEngine


def _broadcast_engine(files: Any) -> Any:
    from dataclasses import dataclass, field

    from llmrl.vllm_broadcast import BROKEN, Group, host_towards, received, unpacked

    @dataclass
    class Init(files.init_info_cls):
        leave: bool = False
        """Leave the group; also how a trainer finds out that this backend is here."""
        host: str = ""
        """Where the trainer's store is; "" = join nothing."""
        port: int = 0
        name: str = ""
        """The group's own, so that members of two do not meet."""
        first: int = 1
        """The rank of this server's first worker."""
        size: int = 1
        via: str = "gloo"
        """gloo or nccl: what the trainer takes."""
        limit_s: float = 300.0

    @dataclass
    class Update(files.update_info_cls):
        path: str = ""
        """As llmrl_file; "" = the tensors below come by broadcast."""
        names: list[str] = field(default_factory=list)
        shapes: list[list[int]] = field(default_factory=list)
        dtypes: list[str] = field(default_factory=list)

    class BroadcastEngine(files):
        init_info_cls: Any = Init
        update_info_cls: Any = Update
        group: Group | None = None

        def init_transfer_engine(self, init_info: Any) -> None:
            from datetime import timedelta

            import torch
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            super().init_transfer_engine(init_info)
            self.shutdown()
            if init_info.host:
                p = self.parallel_config
                rank = init_info.first + p.data_parallel_index * p.world_size + p.rank
                limit = timedelta(seconds=init_info.limit_s)
                store = TCPStore(init_info.host, init_info.port, None, False, limit, wait_for_workers=False)
                mine = host_towards(f"tcp://{init_info.host}")
                device = self.device if init_info.via == "nccl" else torch.device("cpu")
                self.group = Group(store, init_info.name, rank, init_info.size, device, init_info.limit_s, mine)

        def receive_weights(self, update_info: Any) -> None:
            if update_info.path:
                return super().receive_weights(update_info)
            if self.group is None:
                raise RuntimeError(f"{BROKEN} has no member here: this server was restarted")
            data = received(self.group, update_info.shapes, update_info.dtypes)
            self.model.load_weights(unpacked(data, update_info.names, update_info.shapes, update_info.dtypes))

        def shutdown(self) -> None:
            if self.group is not None:
                self.group.close()
                self.group = None

    return BroadcastEngine

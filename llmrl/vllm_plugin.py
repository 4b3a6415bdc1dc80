"""What runs inside vLLM: the weight-transfer backend `llmrl_file`, which reads safetensors files from a path that trainer and server share.

vLLM loads it through the entry point `vllm.general_plugins` of this distribution (`pip install --no-deps llmrl` in vLLM's environment) and
the option `--weight-transfer-config '{"backend": "llmrl_file"}'`. It needs nothing of llmrl, and works where NCCL does not: on CPU, over a
shared disk. Written for vLLM 0.32; llmrl/vllm_engine.py is the other side.
"""

from __future__ import annotations

from typing import Any

BACKEND = "llmrl_file"


def register() -> None:
    """The entry point."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # type: ignore[import-not-found]

    if BACKEND not in WeightTransferEngineFactory._registry:  # every process of a server calls this, some twice
        WeightTransferEngineFactory.register_engine(BACKEND, _engine())


def _engine() -> Any:
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
        init_info_cls = Init
        update_info_cls = Update
        repair = True
        begun = False
        """An update was begun and not finished."""

        def init_transfer_engine(self, init_info: Init) -> None:
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
            self.receive_weights(self.parse_update_info(update_info))  # the base class then asks for an accelerator; a CPU has none

        def receive_weights(self, update_info: Update) -> None:
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

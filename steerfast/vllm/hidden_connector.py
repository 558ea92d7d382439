"""vLLM's connector of hidden states, whose files are whole or not there, on a CPU, too. vLLM imports it by this module's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)

from steerfast.files.replace import replace_file


class WholeHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Writes under a temporary name, then renames; where the cache is on a CPU, which vLLM 0.32 cannot, at once."""

    @staticmethod
    def _write_tensors(tensors: dict[str, Any], event: Any, filename: str, lock_fd: int | None) -> None:
        event.synchronize()
        replace_file(Path(filename), save(tensors))

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache is None or self._kv_cache.device.type != "cpu":
            super()._submit_async_write(pending)
            return
        if self._is_tp_rank_zero:
            blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None]
            slots = (blocks * self._block_size + torch.arange(self._block_size)).flatten()
            states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
            replace_file(Path(pending.filename), save({"hidden_states": states, "token_ids": pending.token_ids}))

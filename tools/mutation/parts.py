"""Which sources are mutated, in four parts, and which tests should notice: the nearest ones first.

Tests are paths below tests/cpp without their ending, or below tests/python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Part = Mapping[str, Sequence[str]]  # source: its tests

_RANK_ALLOCATOR = (
    "allocation/rank_allocator_test", "allocation/optimizer_callbacks_test",
    "allocation/group_test", "allocation/rank_allocator_device_test",
    "allocation/test_allocator_masks.py", "allocation/test_allocator_state_errors.py",
    "allocation/test_allocator_resume.py", "allocation/test_allocator_budget.py",
    "allocation/test_allocator_not_finite.py", "allocation/test_allocator_missing_gradients.py",
    "allocation/test_allocator_shrink.py",
)  # fmt: skip
_SPECTRAL = (
    "allocation/spectral_allocator_test", "allocation/spectral_directions_test",
    "allocation/spectral_training_test", "allocation/spectral_probes_test",
    "allocation/spectral_device_test", "allocation/spectral_group_test",
    "allocation/test_spectral_allocator.py", "allocation/test_spectral_errors.py",
    "allocation/test_spectral_probes.py",
)  # fmt: skip
_CONFIG = (
    "io/adapter_config_test", "io/adalora_config_test", "io/adapter_file_test",
    "io/adapter_damage_test", "io/adapter_layout_test", "files/test_hostile_folders.py",
    "files/test_unknown_options.py", "files/test_refused_adalora.py",
    "files/test_adalora_schedule.py",
)  # fmt: skip
_TENSORS = (
    "io/safetensors_test", "io/tensor_file_test", "io/adapter_file_test", "io/adapter_damage_test",
    "files/test_hostile_folders.py",
)  # fmt: skip
_FOLDERS = (
    "files/test_peft_folders.py", "model/test_model_replaced.py",
    "files/test_refused_folders.py", "files/test_adalora_folders.py",
    "files/test_refused_adalora.py", "files/test_adalora_schedule.py", "files/test_base_weights.py",
    "files/test_export_lora.py", "files/test_wrapped_folders.py", "files/test_meta_folders.py",
    "files/test_hostile_folders.py", "files/test_unsavable_modules.py",
    "files/test_auto_classes.py",
)  # fmt: skip
_ATTACHED = (
    "allocation/test_allocator_attach.py", "allocation/test_allocator_callbacks.py",
    "allocation/test_attached_once.py", "allocation/test_one_allocator.py",
    "allocation/test_averaged_models.py", "allocation/test_allocator_state_errors.py",
    "allocation/test_allocator_budget.py", "allocation/test_rank_rules.py",
    "allocation/test_states_of_moved_directions.py", "allocation/test_allocator_resume.py",
    "allocation/test_adalora_errors.py", "model/test_model_wrappers.py",
)  # fmt: skip

PARTS: Mapping[str, Part] = {
    "allocator": {
        **{f"csrc/allocation/{name}.cpp": _RANK_ALLOCATOR for name in (
            "allocator", "allocator_archive", "averages", "memory_check", "rank_allocator",
            "rank_allocator_adapters", "rank_allocator_state", "rank_allocator_step", "state_check",
        )},
        **{f"csrc/allocation/{name}.cpp": _SPECTRAL for name in (
            "gradient_sketch", "spectral_allocator", "spectral_change", "spectral_event",
            "spectral_scores", "spectral_state",
        )},
        **{f"csrc/allocation/{name}.cpp": (
            "allocation/group_test", "allocation/spectral_group_test",
            "allocation/test_allocator_groups.py",
        ) for name in ("allocator_group", "group_decision")},
        **{f"csrc/allocation/{name}.cpp": (
            "nn/moved_directions_test", *_RANK_ALLOCATOR[:1], *_SPECTRAL[:1],
            "allocation/test_states_of_moved_directions.py", "allocation/test_averaged_models.py",
        ) for name in ("direction_order", "directions")},
        "csrc/allocation/rank_rule.cpp": (
            "allocation/rank_rule_test", "allocation/test_rank_rules.py", *_SPECTRAL[:3],
        ),
        "csrc/allocation/spectrum.cpp": ("allocation/spectrum_test", *_SPECTRAL),
        "python/rankwise/allocator.py": _ATTACHED,
        "python/rankwise/attachment.py": _ATTACHED,
        "python/rankwise/allocated.py": (
            "allocation/test_one_allocator.py", "allocation/test_averaged_models.py",
            "allocation/test_attached_once.py", "allocation/test_allocator_shrink.py",
            "allocation/test_allocator_sharded.py", "allocation/test_allocators_under_fsdp.py",
        ),
        "python/rankwise/allocation.py": (
            "allocation/test_adalora_errors.py", "allocation/test_allocator_budget.py",
            "allocation/test_allocator_masks.py", "allocation/test_orthogonality_penalty.py",
            "allocation/test_allocator_shrink.py", "allocation/test_allocators_under_fsdp.py",
        ),
        "python/rankwise/process_group.py": (
            "allocation/test_allocator_groups.py", "allocation/test_allocator_processes.py",
        ),
        "python/rankwise/rank_budget.py": (
            "analysis/test_rank_budget.py", "analysis/test_rank_advice.py",
        ),
    },
    "schedule": {
        "csrc/allocation/budget_schedule.cpp": (
            "allocation/budget_schedule_test", *_RANK_ALLOCATOR[:1],
            "allocation/test_adalora_errors.py", "allocation/test_allocator_budget.py",
        ),
        "csrc/allocation/rank_allocator_progress.cpp": _RANK_ALLOCATOR,
        "csrc/ops/cpu/progress.cpp": ("ops/importance_test", *_RANK_ALLOCATOR),
        "python/rankwise/config.py": (
            "model/test_config_defaults.py", "allocation/test_adalora_errors.py",
            "nn/test_layer_init.py", "model/test_model_target_errors.py",
            "model/test_model_targets.py",
            "allocation/test_allocator_budget.py", "model/test_model_factor_dtypes.py",
            "files/test_adalora_schedule.py", "allocation/test_allocator_attach.py",
        ),
        "python/rankwise/spectral.py": (
            "model/test_config_defaults.py",
            "allocation/test_spectral_errors.py", "allocation/test_spectral_allocator.py",
            "allocation/test_spectral_probes.py", "allocation/test_rank_rules.py",
        ),
    },
    "reader": {
        **{f"csrc/io/{name}.cpp": _CONFIG for name in (
            "adapter_config", "adapter_config_json", "json_fields", "method_json",
            "allocation_metadata", "target_names",
        )},
        **{f"csrc/io/{name}.cpp": _TENSORS for name in (
            "safetensors", "safetensors_json", "tensor_file", "adapter_tensors",
        )},
        **{f"csrc/io/{name}.cpp": (
            "io/adapter_file_test", "io/adapter_layout_test", "io/adapter_damage_test",
            "io/adapter_beside_test", *_CONFIG[-4:],
        ) for name in ("adapter_checksums", "adapter_file", "adapter_key", "adapter_layout")},
        "csrc/io/bounded_json.cpp": ("io/bounded_json_test", *_CONFIG),
        "csrc/io/module_pattern.cpp": ("io/module_pattern_test", *_CONFIG),
        "csrc/io/pattern_index.cpp": ("io/pattern_index_test", *_CONFIG),
        **{f"python/rankwise/{name}.py": _FOLDERS for name in (
            "file_base", "file_config", "file_names", "file_slots", "files",
        )},
        "python/rankwise/patterns.py": (
            "model/test_model_targets.py", "model/test_model_target_errors.py",
            "files/test_peft_folders.py",
        ),
        "python/rankwise/model_folder.py": (
            "commands/test_merge.py", "commands/test_merge_refused.py",
        ),
    },
    "checks": {
        "csrc/ops/checks.cpp": (
            "ops/lora_linear_test", "ops/test_lora_linear_errors.py", "ops/test_lora_update.py",
            "ops/test_lora_embedding.py", "ops/test_lora_linear_group.py",
            "ops/test_merged_weight.py",
        ),
        "csrc/ops/importance_checks.cpp": (
            "ops/importance_test", "ops/test_importance_errors.py", *_RANK_ALLOCATOR[:1],
        ),
        "python/rankwise/ops.py": (
            "ops/test_lora_linear_errors.py", "ops/test_lora_linear_values.py",
            "ops/test_lora_embedding.py", "ops/test_lora_linear_group.py",
            "ops/test_lora_update.py", "ops/test_merged_weight.py", "ops/test_nested_tensors.py",
            "ops/test_cpu_paths.py", "ops/test_dropout_mask.py",
        ),
        "python/rankwise/linear_group.py": ("nn/test_linear_group.py",),
    },
}  # fmt: skip

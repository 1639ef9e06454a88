"""Every name of TensorRT's Python API that ditc uses, with its parameters as recorded from tensorrt-rtx 1.7.1.116.

Both libraries must have a name unless it is in RTX_ONLY or TENSORRT_ONLY. The list was compared once by hand with the
bindings of tensorrt 11.4.0.106, imported over empty libraries, and there was no difference. The names are used by
runtime/sessions/tensorrt_engine.py, tensorrt_log.py, runtime/plugins/, export/engine/tensorrt.py and
export/graph/ops/*_linear_attention/qdp.py.
"""

from __future__ import annotations

import re
from typing import Any

# "Class.method": the names of its parameters after self, as pybind11 prints them; () for attributes and enum members.
API: dict[str, tuple[str, ...]] = {
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network_to_stream": ("network", "config", "writer"),
    "BuilderFlag.REFIT_INDIVIDUAL": (),
    "BuilderFlag.TF32": (),
    "BuilderFlag.WEIGHT_STREAMING": (),
    "DataType.BF16": (),
    "DataType.BOOL": (),
    "DataType.FLOAT": (),
    "DataType.HALF": (),
    "DataType.INT64": (),
    "DimsExprs.__init__": (),
    "ExecutionContextAllocationStrategy.USER_MANAGED": (),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.clear_flag": ("flag",),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.get_flag": ("flag",),
    "IBuilderConfig.get_timing_cache": (),
    "IBuilderConfig.progress_monitor": (),
    "IBuilderConfig.set_flag": ("flag",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "ICudaEngine.create_execution_context": ("runtime_config",),
    "ICudaEngine.create_runtime_config": (),
    "ICudaEngine.get_device_memory_size_for_profile_v2": ("profile_index",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.get_tensor_location": ("name",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "ICudaEngine.get_weight_streaming_automatic_budget": (),
    "ICudaEngine.num_io_tensors": (),
    "ICudaEngine.num_optimization_profiles": (),
    "ICudaEngine.streamable_weights_size": (),
    "ICudaEngine.weight_streaming_budget_v2": (),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
    "IExecutionContext.get_tensor_shape": ("name",),
    "IExecutionContext.set_device_memory": ("memory", "size"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.update_device_memory_size_for_shapes": (),
    "ILogger.ERROR": (),
    "ILogger.INFO": (),
    "ILogger.INTERNAL_ERROR": (),
    "ILogger.VERBOSE": (),
    "ILogger.WARNING": (),
    "ILogger.log": ("severity", "msg"),
    "INetworkDefinition.get_flag": ("flag",),
    "INetworkDefinition.get_input": ("index",),
    "INetworkDefinition.get_layer": ("index",),
    "INetworkDefinition.get_output": ("index",),
    "INetworkDefinition.mark_weights_refittable": ("name",),
    "INetworkDefinition.num_inputs": (),
    "INetworkDefinition.num_layers": (),
    "INetworkDefinition.num_outputs": (),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "IPluginCreatorV3One.create_plugin": ("name", "field_collection", "phase"),
    "IPluginCreatorV3One.field_names": (),
    "IPluginRegistry.register_creator": ("creator", "plugin_namespace"),
    "IPluginV3.clone": (),
    "IPluginV3.get_capability_interface": ("type",),
    "IPluginV3OneBuild.configure_plugin": ("in", "out"),
    "IPluginV3OneBuild.get_output_data_types": ("input_types",),
    "IPluginV3OneBuild.get_output_shapes": ("inputs", "shape_inputs"),
    "IPluginV3OneBuild.get_workspace_size": ("in", "out"),
    "IPluginV3OneBuild.num_outputs": (),
    "IPluginV3OneBuild.supports_format_combination": ("pos", "in_out", "num_inputs"),
    "IPluginV3OneCore.plugin_name": (),
    "IPluginV3OneRuntime.attach_to_context": ("resource_context",),
    "IPluginV3OneRuntime.enqueue": ("input_desc", "output_desc", "inputs", "outputs", "workspace", "stream"),
    "IPluginV3OneRuntime.get_fields_to_serialize": (),
    "IPluginV3OneRuntime.on_shape_change": ("in", "out"),
    "IPluginV3OneRuntime.set_tactic": ("tactic",),
    "IProgressMonitor.phase_finish": (),
    "IProgressMonitor.phase_start": (),
    "IProgressMonitor.step_complete": (),
    "IRuntimeConfig.set_execution_context_allocation_strategy": ("strategy",),
    "IStreamWriter.write": (),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": (),
    "OnnxParser.get_error": ("index",),
    "OnnxParser.num_errors": (),
    "OnnxParser.parse_from_file": (),
    "ParserError.desc": (),
    "ParserError.node": (),
    "ParserError.node_name": (),
    "ParserError.node_operator": (),
    "PluginField.__init__": ("name", "data", "type"),
    "PluginFieldCollection.__init__": (),
    "PluginFieldType.CHAR": (),
    "PluginFieldType.FLOAT32": (),
    "Refitter.__init__": ("engine", "logger"),
    "Refitter.get_missing_weights": (),
    "Refitter.refit_cuda_engine": (),
    "Refitter.set_named_weights": ("name", "weights"),
    "Runtime.__init__": ("logger",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "TensorFormat.LINEAR": (),
    "TensorIOMode.INPUT": (),
    "TensorLocation.HOST": (),
    "Weights.__init__": ("type", "ptr", "count"),
}
RTX_ONLY: dict[str, tuple[str, ...]] = {
    "ComputeCapability.SM75": (),
    "ComputeCapability.SM80": (),
    "ComputeCapability.SM86": (),
    "ComputeCapability.SM89": (),
    "ComputeCapability.SM120": (),
    "ComputeCapability.SM121": (),
    "CudaGraphStrategy.DISABLED": (),
    "DynamicShapesKernelSpecializationStrategy.EAGER": (),
    "EngineInvalidityDiagnostics.UNSUPPORTED_CC": (),
    "EngineInvalidityDiagnostics.VERSION_MISMATCH": (),
    "EngineValidity.INVALID": (),
    "EngineValidity.SUBOPTIMAL": (),
    "IBuilderConfig.num_compute_capabilities": (),
    "IBuilderConfig.set_compute_capability": ("compute_capability", "index"),
    "IExecutionContext.is_stream_capturable": ("stream",),
    "IRuntimeCache.deserialize": ("blob",),
    "IRuntimeCache.serialize": (),
    "IRuntimeConfig.create_runtime_cache": (),
    "IRuntimeConfig.cuda_graph_strategy": (),
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": (),
    "IRuntimeConfig.set_runtime_cache": ("cache",),
    "Runtime.engine_header_size": (),
    "Runtime.get_engine_validity": ("buffer",),
}
TENSORRT_ONLY: dict[str, tuple[str, ...]] = {
    "HardwareCompatibilityLevel.AMPERE_PLUS": (),
    "HardwareCompatibilityLevel.NONE": (),
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": (),
    "IBuilderConfig.hardware_compatibility_level": (),
    "NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS": (),
    # export/graph/ops/*_linear_attention/qdp.py; functions of the module tensorrt.plugin
    "plugin.KernelLaunchParams": (),
    "plugin.SymInt32": (),
    "plugin.SymIntExprs": (),
    "plugin.TensorDesc": (),
    "plugin.aot_impl": (),
    "plugin.register": (),
}


def differences(module: Any, api: dict[str, tuple[str, ...]]) -> list[str]:
    """The names that a library lacks or whose parameters differ, one line each."""
    found = []
    for path, parameters in api.items():
        target: Any = module
        for name in path.split("."):
            target = getattr(target, name, None)
        if target is None:
            found.append(f"{path} is missing")
            continue
        if parameters and not any(_names(line, parameters) for line in _signatures(target)):
            found.append(f"{path} does not take {', '.join(parameters)}: {_signatures(target)}")
    return found


def _signatures(target: Any) -> list[str]:
    """All signatures in a docstring of pybind11, including overloads."""
    lines = (target.__doc__ or "").splitlines()
    return [line for line in lines if re.match(r"^(\d+\. )?\w+\(", line)]


def _names(signature: str, parameters: tuple[str, ...]) -> bool:
    """Whether the signature has these parameters in this order, by name."""
    at = 0
    for name in parameters:
        match = re.compile(rf"\b{name}\b\s*[:=]").search(signature, at)
        if match is None:
            return False
        at = match.end()
    return True

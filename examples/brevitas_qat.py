"""QAT with Brevitas layers; exported as QCDQ (quantize, clip, dequantize) ONNX."""

import brevitas.nn as qnn
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.quant import Uint8ActPerTensorFloat
from sparkir import Spark
from torch.nn.functional import l1_loss

import pipeline


def main(*, seed, steps, folder):
    """Train, export, and measure both."""
    student = pipeline.student(
        seed,
        conv=lambda *sizes, **options: qnn.QuantConv2d(*sizes, **options, weight_bit_width=8),
        relu=torch.nn.ReLU,
        quant=lambda: qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat),
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-4)
    spark = Spark()
    for lq, gt in pipeline.batches(seed, steps):
        output = student(lq)
        kd, _ = spark.weigh(output, pipeline.teacher(lq), gt)
        loss = l1_loss(output, gt) + kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spark.learn()
    student.eval()

    file = folder / "student.onnx"
    export_onnx_qcdq(student, pipeline.example_inputs()[0], str(file), dynamo=False)
    return {"qat": pipeline.psnr(student), "export": pipeline.onnx_psnr(file)}


if __name__ == "__main__":
    pipeline.report(main, "brevitas", "onnx", "onnxruntime")

"""QAT in plain PyTorch, with fake-quant modules of one's own; exported by torch.onnx."""

import torch
from sparkir import Spark
from torch.nn.functional import l1_loss

import pipeline
from fakequant import Grid, QuantConv


def main(*, seed, steps, folder):
    """Train, export, and measure both."""
    student = pipeline.student(seed, conv=QuantConv, quant=Grid)
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
    torch.onnx.export(student, pipeline.example_inputs(), file, dynamo=True)
    return {"qat": pipeline.psnr(student), "export": pipeline.onnx_psnr(file)}


if __name__ == "__main__":
    pipeline.report(main, "onnx", "onnxscript", "onnxruntime")

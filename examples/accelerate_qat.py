"""QAT under Hugging Face Accelerate, over two micro-batches a step."""

import torch
from accelerate import Accelerator
from sparkir import Spark
from torch.nn.functional import l1_loss

import pipeline
from fakequant import Grid, QuantConv


def main(*, seed, steps, folder):
    """Train, export, and measure both."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    student = pipeline.student(seed, conv=QuantConv, quant=Grid)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-4)
    student, optimizer = accelerator.prepare(student, optimizer)
    spark = Spark().to(accelerator.device)
    for lq, gt in pipeline.batches(seed, 2 * steps):
        with accelerator.accumulate(student):
            output = student(lq)
            kd, _ = spark.weigh(output, pipeline.teacher(lq), gt)
            loss = l1_loss(output, gt) + kd
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                spark.learn()
    student = accelerator.unwrap_model(student).eval()

    file = folder / "student.onnx"
    torch.onnx.export(student, pipeline.example_inputs(), file, dynamo=True)
    return {"qat": pipeline.psnr(student), "export": pipeline.onnx_psnr(file)}


if __name__ == "__main__":
    pipeline.report(main, "accelerate", "onnx", "onnxruntime")

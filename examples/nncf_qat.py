"""QAT with NNCF, started from its calibration; exported to OpenVINO."""

import nncf
import openvino
import torch
from sparkir import Spark
from torch.nn.functional import l1_loss

import pipeline


def main(*, seed, steps, folder):
    """Train, export, and measure both."""
    calibration = nncf.Dataset([lq for lq, _ in pipeline.batches(seed, 8)])
    student = nncf.quantize(pipeline.student(seed).eval(), calibration, subset_size=8)
    student.train()
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
    trained = pipeline.psnr(student.eval())

    (example,) = pipeline.example_inputs()
    stripped = nncf.strip(student, example_input=example)
    model = openvino.convert_model(stripped, example_input=example)
    openvino.save_model(model, folder / "student.xml", compress_to_fp16=False)
    runs = openvino.Core().compile_model(folder / "student.xml", "CPU")
    exported = pipeline.psnr(lambda lq: torch.from_numpy(runs(lq.numpy())[0].copy()))
    return {"qat": trained, "export": exported}


if __name__ == "__main__":
    pipeline.report(main, "nncf", "openvino", "torchao")  # nncf.strip imports torchao

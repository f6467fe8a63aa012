"""QAT in a LightningModule; the trainer owns the loop."""

import lightning
import torch
from sparkir import Spark
from torch.nn.functional import l1_loss

import pipeline
from fakequant import Grid, QuantConv


class Training(lightning.LightningModule):
    def __init__(self, student):
        super().__init__()
        self.student = student
        self.spark = Spark()

    def training_step(self, batch, _):
        lq, gt = batch
        output = self.student(lq)
        return l1_loss(output, gt) + self.spark.weigh(output, pipeline.teacher(lq), gt)[0]

    def on_before_optimizer_step(self, optimizer):
        self.spark.learn()

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=5e-4)


def main(*, seed, steps, folder):
    """Train, export, and measure both."""
    student = pipeline.student(seed, conv=QuantConv, quant=Grid)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", enable_model_summary=False, **quiet
    )
    batches = torch.utils.data.DataLoader(list(pipeline.batches(seed, steps)), batch_size=None)
    trainer.fit(Training(student), batches)
    student.eval()

    file = folder / "student.onnx"
    torch.onnx.export(student, pipeline.example_inputs(), file, dynamo=True)
    return {"qat": pipeline.psnr(student), "export": pipeline.onnx_psnr(file)}


if __name__ == "__main__":
    pipeline.report(main, "lightning", "onnx", "onnxruntime")

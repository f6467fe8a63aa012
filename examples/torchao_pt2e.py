"""QAT by torchao's PT2E, a graph without named submodules; converted by convert_pt2e."""

import torch
from sparkir import Spark
from torch.nn.functional import l1_loss
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import pipeline


def main(*, seed, steps, folder):
    """Train, convert, and measure both."""
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    example = (torch.rand(2, 3, 32, 32),)
    graph = torch.export.export(pipeline.student(seed), example, dynamic_shapes=(sizes,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    student = prepare_qat_pt2e(graph, quantizer)
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
    student.apply(torch.ao.quantization.disable_observer)
    trained = pipeline.psnr(student)

    integer = convert_pt2e(student)
    torch.export.save(
        torch.export.export(integer, example, dynamic_shapes=(sizes,)), folder / "student.pt2"
    )
    return {"qat": trained, "export": pipeline.psnr(integer)}


if __name__ == "__main__":
    pipeline.report(main, "torchao")

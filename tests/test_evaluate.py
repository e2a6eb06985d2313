"""Errors are exact counts."""

import torch

from resnet_train.evaluate import Count, count_errors, wrong_answers
from resnet_train.models import cifar_resnet


def test_wrong_answers_by_hand():
    logits = torch.eye(7) * 5 - torch.arange(7.0) * 0.1
    labels = torch.tensor([0, 1, 2, 0, 6, -1, 6])
    # rows 0, 1, 2 and 6 are right; row 3 says 3 for 0 (0 is second); row 4 says 4 for 6 (6 is last); row 5 is no image
    assert wrong_answers(logits, labels).tolist() == [2, 1]


def test_top5_of_three_classes_is_never_wrong():
    assert wrong_answers(torch.randn(9, 3), torch.arange(9) % 3)[1] == 0


def test_error_is_wrong_over_seen():
    count = Count(wrong=3, wrong5=1, seen=8, loss_sum=4.0)
    assert (count.error, count.error5, count.loss) == (37.5, 12.5, 0.5)


def test_the_count_is_that_of_a_plain_loop_whatever_fills_the_last_batch():
    torch.manual_seed(0)
    model = cifar_resnet(8, "A")
    images, labels = torch.randn(23, 3, 32, 32), torch.randint(0, 10, (23,))
    model.train()
    count = count_errors(model, batches(images, labels, 10), "fp32", 23)
    assert model.training
    model.eval()
    with torch.no_grad():
        answers = model(images).argmax(1)
        loss = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert (count.wrong, count.seen) == (int((answers != labels).sum()), 23)
    assert abs(count.loss - loss) < 1e-5


def test_evaluation_leaves_the_running_statistics_alone():
    model = cifar_resnet(8, "A").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    count_errors(model, batches(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64), 4), "bf16", 8)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def batches(images, labels, size):
    for start in range(0, len(images), size):
        part, truth = images[start : start + size], labels[start : start + size]
        fill = size - len(part)
        yield torch.cat([part, part[:1].expand(fill, -1, -1, -1)]), torch.cat([truth, truth.new_full((fill,), -1)])

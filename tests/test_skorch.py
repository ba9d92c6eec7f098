"""skorch hands its closure to step: training as by hand, in its own bookkeeping too."""

import pytest
import torch
import trainers
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping
from torch import nn
from torch.nn.functional import cross_entropy

from bsam_fused import SAM

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 320


def fitted(kind, callbacks=None, **options):
    net = NeuralNetClassifier(
        trainers.network(),
        criterion=nn.CrossEntropyLoss,
        optimizer=kind,
        lr=0.2,
        optimizer__momentum=0.9,
        optimizer__weight_decay=1e-4,
        optimizer__rho=0.05,
        batch_size=trainers.MICRO,
        max_epochs=2,
        train_split=None,
        callbacks=callbacks,
        verbose=0,
        **options,
    )
    return net.fit(trainers.DATA.x[:IMAGES].numpy(), trainers.DATA.y[:IMAGES].numpy())


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_trains_as_by_hand(kind):
    """To the bit; the history's loss is that at w, of the first pass of each step."""
    batches = list(trainers.loader(IMAGES))
    net = fitted(kind)
    assert trainers.same(net.module_, trainers.by_hand(kind, batches, 1, epochs=2))
    first = cross_entropy(trainers.network()(batches[0][0]), batches[0][1]).item()
    assert net.history[0, "batches", 0, "train_loss"] == pytest.approx(first)


def test_clipping_of_its_own():
    """Every pass is clipped: of SAM the direction, as ``max_grad_norm`` does it; the radius is ρ all the same."""
    theirs = fitted(SAM, [GradientNormClipping(0.1)])
    ours = fitted(SAM, optimizer__max_grad_norm=0.1)
    for p, q in zip(theirs.module_.parameters(), ours.module_.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_resumes_from_its_files(tmp_path):
    """save_params and load_params, optimizer included: as if not stopped."""
    files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net = fitted(SAM)
    net.save_params(**files)
    again = fitted(SAM).initialize()
    again.load_params(**files)
    for each in (net, again):
        each.partial_fit(trainers.DATA.x[:IMAGES].numpy(), trainers.DATA.y[:IMAGES].numpy())
    assert trainers.same(net.module_, again.module_)

"""fastai's Learner, with the callback of docs/recipes.md (`make test-trainers`)."""

from functools import partial

import pytest
import recipes
import torch
import trainers
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # noqa: F403  adds fit_one_cycle to Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import TensorDataset

from bsam_fused import BSAM

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 4 * trainers.MICRO


class OtherPasses(Callback):
    """The recipe's, for either optimizer."""

    def before_step(self):
        for call in self.opt.opt._calls[:-1]:
            getattr(self.opt.opt, call)()
            self.learn.loss_func(self.model(*self.xb), *self.yb).backward()


def learner(kind, *callbacks, splitter=None, folder="."):
    images = TensorDataset(trainers.DATA.x[:IMAGES], trainers.DATA.y[:IMAGES])
    data = DataLoaders(DataLoader(images, bs=trainers.MICRO), DataLoader(images, bs=trainers.MICRO))
    build = partial(OptimWrapper, opt=kind, momentum=0.9, weight_decay=1e-4, rho=0.05)
    more = {} if splitter is None else {"splitter": splitter}
    made = Learner(
        data,
        trainers.network(),
        nn.CrossEntropyLoss(),
        build,
        cbs=callbacks,
        path=folder,
        wd=1e-4,
        moms=(0.9,) * 3,
        **more,
    )
    made.no_bar().__enter__(), made.no_logging().__enter__()
    return made


def test_recipe():
    (code,) = (code for heading, code in recipes.SNIPPETS if heading == "fastai")
    names = recipes.run(code)
    assert names["learner"].opt.opt.skipped_steps == 0
    names["learner"].scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="32 bits"), names["learner"].no_bar(), names["learner"].no_logging():
        names["learner"].fit(1)


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_alone_it_raises(kind):
    alone = learner(kind)
    with pytest.raises(RuntimeError, match="all passes by hand"):
        alone.fit(1, 0.2)
    assert trainers.same(alone.model, trainers.network())


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_trains_as_by_hand(kind):
    trained = learner(kind, OtherPasses())
    trained.fit(2, 0.2)
    assert trainers.same(trained.model, trainers.by_hand(kind, list(trainers.loader(IMAGES)), 1, epochs=2))


def test_one_cycle():
    """Learning rate and momentum arrive in the groups, and ρ_min follows the former."""
    trained = learner(BSAM, OtherPasses())
    trained.fit_one_cycle(2, 0.2, moms=(0.95, 0.85, 0.95))
    last = trained.opt.opt.param_groups[0]
    assert last["lr"] == pytest.approx(trained.recorder.lrs[-1])
    assert max(trained.recorder.lrs) == pytest.approx(0.2, rel=0.1)
    assert last["momentum"] == pytest.approx(0.95, rel=1e-2)
    share = last["lr"] / max(trained.recorder.lrs)
    assert share < 0.1
    assert trained.opt.opt.metrics()["rho_min"] == pytest.approx(0.05 * share)


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_resumes(kind, tmp_path):
    """save and load, optimizer included: as if not stopped."""
    trained, again = (learner(kind, OtherPasses(), folder=tmp_path) for _ in range(2))
    trained.fit(1, 0.2)
    trained.save("net")
    again.load("net")
    assert again.opt.opt.state
    for each in (trained, again):
        each.fit(1, 0.2)
    assert trainers.same(trained.model, again.model)


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_frozen_layers_stay(kind):
    """freeze() and unfreeze(), between steps."""
    trained = learner(kind, OtherPasses(), splitter=lambda net: [list(net[1].parameters()), list(net[3].parameters())])
    trained.freeze()
    trained.fit(1, 0.2)
    body, start = trained.model[1], trainers.network()[1]
    assert trainers.same(body, start)
    trained.unfreeze()
    trained.fit(1, 0.2)
    assert not trainers.same(body, start)

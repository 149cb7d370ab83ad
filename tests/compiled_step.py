"""A training step with norms and MLPs compiled, in a process of its own, which alone has what torch.compile leaves."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


def apart(function, *arguments):
    """What `function` of a module returns, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def steps(configs, backend):
    """Of a step of each: which modules `backend` compiled whole, what was logged of it, and the gradients."""
    from dms_lab.training import run

    torch.set_num_threads(1)
    compile_module, compiled, said = torch.nn.Module.compile, [], []

    def compile_whole(part):
        compiled.append(type(part).__name__)
        compile_module(part, backend=backend, fullgraph=True)

    torch.nn.Module.compile = compile_whole
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("dms_lab").addHandler(handler)
    logging.getLogger("dms_lab").setLevel(logging.INFO)
    found = []
    for config in configs:
        module, _ = run.build_module(config)
        module.on_fit_start()
        batch = run.RetrofitData(config, run.models.load_tokenizer(config.model)).batch(0)
        with run.compile_time_told():
            module.loss(batch, 5).backward()
        found.append(([*compiled], " ".join(said), {name: p.grad.numpy() for name, p in module.trained.items()}))
        compiled.clear()
        said.clear()
    return found

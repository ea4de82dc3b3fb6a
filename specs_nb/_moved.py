"The modules' old paths: `import specs_nb.generate` is `import specs_nb.engines.generate`, the same object."

import importlib
import runpy
import sys
import types


class _Parts(types.ModuleType):
    """An old module that lies in several new ones: a name is read where it is, and what is set (by a test) is
    set in each that has the name. Deleting a name puts back what was there before it was last set: so
    `unittest.mock` and pytest's `monkeypatch` end a patch of a name that isn't the module's own"""

    def __getattr__(self, name):
        for part in self.__dict__["_parts"]:
            if name in vars(part):
                return vars(part)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name, value):
        if name.startswith("__"):
            return super().__setattr__(name, value)
        parts = self.__dict__["_parts"]
        there = [p for p in parts if name in vars(p)]
        self.__dict__["_before"].setdefault(name, []).append([(p, vars(p)[name]) for p in there])
        for part in there or parts[:1]:
            setattr(part, name, value)

    def __delattr__(self, name):
        if not self.__dict__["_before"].get(name):
            raise AttributeError(f"{name!r} was not set through {self.__name__!r}: it lies in another module")
        there = self.__dict__["_before"][name].pop()
        for part, value in there:
            setattr(part, name, value)
        if not there:  # nobody had it
            delattr(self.__dict__["_parts"][0], name)

    def __dir__(self):
        return sorted({name for part in self.__dict__["_parts"] for name in vars(part)})


def lender(
    *modules: str,  # that names moved to
):  # a module's `__getattr__`
    "Names of other modules, found when they are asked for: for a module that was cut into several."

    def lend(name):
        if not name.startswith("__"):
            for module in map(importlib.import_module, modules):
                if name in vars(module):
                    return vars(module)[name]
        raise AttributeError(f"no module of {', '.join(modules)} has {name!r}")

    return lend


def moved(
    name: str,  # `__name__` of the old module
    *to: str,  # the new one, or several that it was split into; `python -m` runs the last
):
    "Put the new module in the place of the old one."
    if name == "__main__":
        runpy.run_module(to[-1], run_name="__main__", alter_sys=True)
        return
    modules = [importlib.import_module(t) for t in to]
    if len(modules) == 1:
        sys.modules[name] = modules[0]
        return
    old = _Parts(name, modules[0].__doc__)
    old.__dict__.update(
        _parts=modules,
        _before={},
        __spec__=sys.modules[name].__spec__,
        __file__=sys.modules[name].__file__,
        __all__=sorted({n for m in modules for n in m.__all__}),
    )
    sys.modules[name] = old

from specs_nb._moved import moved; moved(__name__, "specs_nb.engines.generate", "specs_nb.engines.vllm_engine", "specs_nb.engines.server", "specs_nb.engines.jobs")

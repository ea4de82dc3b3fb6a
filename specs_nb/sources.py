from specs_nb._moved import moved; moved(__name__, "specs_nb.inputs.sources", "specs_nb.inputs.drafts", "specs_nb.inputs.files", "specs_nb.inputs.apart")

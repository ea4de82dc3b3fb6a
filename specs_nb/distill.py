from specs_nb._moved import moved; moved(__name__, "specs_nb.pairs")

"What comes from outside: data sets, and the judge."

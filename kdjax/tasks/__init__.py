"""What a batch means: the modules here have the same functions, and a config says which one it is for.

- ``load(config)``: the data set, checked;
- ``student_view(dataset, config)`` and ``teacher_view(dataset, config)``: what of it each of them sees;
- ``classes(config, dataset)``: how many there are to choose from;
- ``make_model(config, part, dataset, classes)``: a part of the config (teacher, student, …) as a model;
- ``inputs(dataset, batch_size)``: the shapes of what a model takes;
- ``setting(config, mesh)``: what the objective must know besides;
- ``make_preprocess(dataset, augment)`` and ``make_normalise(dataset)``: from a batch of the data to one of the models;
- ``padded(batch)``: two batches of the models that differ in padding alone;
- ``make_accuracy(model, dataset, mesh, batch_size)``: ``variables -> share of right answers`` on the test split.
"""

"""Train, evaluate and predict with test-time augmentation: image classification on any device."""

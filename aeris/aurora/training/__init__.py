"""Training Aurora models: weather to train on, loss, updates and validation.

Unlike the model beside it, this part may use the rest of the house.
"""

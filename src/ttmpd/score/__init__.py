"""How much a removal would hurt, predicted without fine-tuning."""

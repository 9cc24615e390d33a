"""Make a pretrained model faster on your device, adapted to your data, without labels."""

"""Every transformer, UNet and prior class that diffusers exports, at tiny size, each with a call that fits it."""

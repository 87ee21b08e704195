"""Bicubic resizing of images on the device, one axis per launch."""

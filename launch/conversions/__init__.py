"""One checkpoint turned into another: the programs behind `launch.convert`."""

"""Full disks, failing disks, power cuts."""

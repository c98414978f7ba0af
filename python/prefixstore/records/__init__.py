"""Commands that look at records: `kvkernels inspect` and `kvkernels verify`."""

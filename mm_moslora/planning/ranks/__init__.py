"""`doctor --distributed`: what the ranks, their hosts and the network between them lack."""
